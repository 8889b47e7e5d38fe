"""Jacobian-vector products of recorded forward passes against torch's own forward mode."""

from __future__ import annotations

import pytest
import torch
from python_operations import python_operations_noted
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
    "layer norm": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Unflatten(1, (2, 3)), nn.LayerNorm((2, 3), bias=False)
    ),
    "no affine layer norm": lambda: nn.Sequential(
        nn.LayerNorm(4), nn.Linear(4, 3), nn.LayerNorm(3, eps=0.1, elementwise_affine=False)
    ),
    "dropout": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Dropout2d(0.3), nn.Dropout(0.2), nn.Tanh(), nn.Dropout(0.0)
    ),
    "dropout in place": lambda: nn.Sequential(
        nn.Linear(4, 30), nn.Dropout(0.3, inplace=True), nn.Linear(30, 3), nn.Dropout(1.0)
    ),
    "shared": lambda: nn.Sequential(*[nn.Linear(4, 4)] * 3),
}
IMAGES = (5, 2, 6, 6)
INPUTS = {
    "convolutions": IMAGES,
    "transposed": (5, 2, 3, 4),
    "batch norm": (5, 2, 7),
    "dropout": IMAGES,
}


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
        torch.manual_seed(1)
        return functional_call(model, {**point, **buffers, **values}, (x,), tie_weights=False)

    _, expected = jvp(output, ({n: point[n] for n in names},), (tangent,))
    loss_fn = nn.MSELoss()
    recorder = Recorder(model, loss_fn, lambda *_: None)
    recorder.keeps_outputs = True
    torch.manual_seed(1)
    y = model(x)
    loss_fn(y, torch.zeros_like(y)).backward()
    (batch,) = recorder.take()
    replay = Replay(model, recorder.paused)
    for _ in range(2):
        ((found,),) = replay.jacobian_products(batch, point, [tangent])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_products_with_constants_do_not_call_operations_that_torch_writes_in_python() -> None:
    model, loss_fn = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Dropout(0.4)), nn.MSELoss()
    recorder = Recorder(model, loss_fn, lambda *_: None)
    recorder.keeps_outputs = True
    loss_fn(model(torch.randn(5, 4)), torch.zeros(5, 3)).backward()
    (batch,) = recorder.take()
    point = {n: p.detach().clone() for n, p in model.named_parameters()}
    replay = Replay(model, recorder.paused)
    replay.jacobian_products(batch, point, [point])  # what is imported on first use is
    with python_operations_noted() as called:
        replay.jacobian_products(batch, point, [point])
    assert not called


def test_dropout_of_images_that_are_stored_channels_last_drops_the_recorded_entries() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    model, loss_fn = nn.Sequential(conv, nn.Dropout(0.4)).double(), nn.MSELoss()
    recorder = Recorder(model, loss_fn, lambda *_: None)
    recorder.keeps_outputs = True
    y = model(torch.randn(IMAGES).double())
    loss_fn(y, torch.zeros_like(y)).backward()
    (batch,) = recorder.take()
    point = {n: p.detach().clone() for n, p in model.named_parameters()}
    tangent = {n: torch.rand_like(p) + 1 for n, p in point.items()}
    ((found,),) = Replay(model, recorder.paused).jacobian_products(batch, point, [tangent])
    assert not y.is_contiguous()
    assert torch.equal(found == 0, y == 0)
