"""Jacobian-vector products of recorded forward passes against torch's own forward mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from einconv_kfac.optim.recording.recorder import Recorder
from einconv_kfac.optim.replay.replay import Replay

NETS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False),
        nn.Flatten(),
    ),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(2, 3, (3, 2), (2, 1), (1, 0), output_padding=(1, 0)),
        nn.Tanh(),
        nn.ConvTranspose2d(3, 4, 2, dilation=2),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 3, groups=2, bias=False),
        nn.Flatten(),
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.BatchNorm1d(3), nn.GELU()
    ),
    "no affine map": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)),
    "shared": lambda: nn.Sequential(*[nn.Linear(4, 4)] * 3),
}
INPUTS = {"convolutions": (5, 2, 6, 6), "transposed": (5, 2, 3, 4), "batch norm": (5, 2, 7)}


@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_products_are_those_of_torch(name: str, training: bool, frozen: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]().double().train(training)
    x = torch.randn(INPUTS.get(name, (5, 4))).double()
    names = [n for n, _ in model.named_parameters() if not frozen or not n.endswith(frozen)]
    point = {n: p.detach().clone() for n, p in model.named_parameters()}
    tangent = {n: torch.randn_like(point[n]) for n in names}

    def output(values: dict[str, Tensor]) -> Tensor:
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        return functional_call(model, {**point, **buffers, **values}, (x,), tie_weights=False)

    _, expected = jvp(output, ({n: point[n] for n in names},), (tangent,))
    loss_fn = nn.MSELoss()
    recorder = Recorder(model, loss_fn, lambda *_: None)
    recorder.keeps_outputs = True
    y = model(x)
    loss_fn(y, torch.zeros_like(y)).backward()
    (batch,) = recorder.take()
    replay = Replay(model, recorder.paused)
    for _ in range(2):
        ((found,),) = replay.jacobian_products(batch, point, [tangent])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
