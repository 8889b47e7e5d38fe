"""Weights that hooks of torch compute before each call, as plain attributes of their layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from optim_cases import train_step
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.utils import prune, spectral_norm

from einconv_kfac import KFAC
from einconv_kfac.optim.recording.recorder import Recorder
from einconv_kfac.optim.replay.replay import Replay


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.4)
    prune.random_unstructured(layer, "bias", 0.4)


def as_buffer(layer: nn.Module) -> None:
    bias = layer._parameters.pop("bias")
    assert bias is not None
    layer.register_buffer("bias", bias.detach())


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "pruning": pruned,
    "spectral norm": spectral_norm,
    "a buffer": as_buffer,
}


def network(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    CHANGES[name](model[0])
    CHANGES[name](model[3])
    return model


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:.*spectral_norm. is deprecated")
def test_products_are_those_of_torch(name: str) -> None:
    model = network(name).eval()
    x = torch.randn(5, 2, 4).double()
    point = {n: p.detach().clone() for n, p in model.named_parameters()}
    tangent = {n: torch.randn_like(p) for n, p in point.items()}

    def output(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (x,), tie_weights=False)

    _, expected = jvp(output, (point,), (tangent,))
    model(x)  # the hooks compute the weights anew
    loss_fn = nn.MSELoss()
    recorder = Recorder(model, loss_fn, lambda *_: None)
    recorder.keeps_outputs = True
    y = model(x)
    loss_fn(y, torch.zeros_like(y)).backward()
    (batch,) = recorder.take()
    ((found,),) = Replay(model, recorder.paused).jacobian_products(batch, point, [tangent])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:.*spectral_norm. is deprecated")
def test_steps_leave_the_model_as_it_is(name: str) -> None:
    model, loss_fn = network(name), nn.MSELoss()
    x, y = torch.randn(32, 2, 4).double(), torch.randn(32, 2).double()
    names = [list(m._parameters) + list(m._buffers) for m in model.modules()]
    opt = KFAC(model, loss_fn)
    losses = [train_step(model, loss_fn, opt, (x, y)) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    assert names == [list(m._parameters) + list(m._buffers) for m in model.modules()]
