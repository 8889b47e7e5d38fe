"""Input factors of batch norms equal the moments of their normalised inputs, by definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from einconv_kfac.curvature import kronecker_factors

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "training": lambda: nn.BatchNorm2d(3, eps=0.1),
    "evaluation": lambda: nn.BatchNorm2d(3).eval(),
    "without statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(),
    "without bias": lambda: nn.BatchNorm2d(3),
}


def definition(layer: nn.Module, x: Tensor, bias: bool) -> Tensor:
    """``1/n sum [a, 1] [a, 1]^T`` per channel for normalised inputs ``a``, in float64."""
    statistics = [getattr(layer, name) for name in ("running_mean", "running_var")]
    uses_batch = layer.training or statistics[0] is None
    known = [None, None] if uses_batch else [own.double() for own in statistics]
    a = batch_norm(x.double(), *known, training=uses_batch, eps=float(layer.eps))  # type: ignore[arg-type]
    a = a.flatten(2).movedim(1, 0).flatten(1)  # c (n s)
    columns = torch.stack([a, torch.ones_like(a)] if bias else [a], -1)
    return columns.mT @ columns / len(x)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", LAYERS)
def test_moments(kind: str, memory: torch.memory_format, dtype: torch.dtype, shift: float) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    if layer.running_mean is not None:
        nn.init.normal_(layer.running_mean, shift)  # type: ignore[arg-type]
        nn.init.uniform_(layer.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    bias = kind != "without bias"
    if not bias:
        layer.bias.requires_grad_(False)  # type: ignore[operator, union-attr]
    x = (torch.randn(5, 3, 4, 2, dtype=dtype) + shift).to(memory_format=memory)
    expected = definition(layer, x, bias)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 2, dtype=dtype))
    model.train(layer.training)
    data = [(x, torch.tensor([0, 1, 0, 1, 1]))]
    found = kronecker_factors(model, nn.CrossEntropyLoss(), data)["0"].A
    close = (
        {"rtol": 1e-10, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-2}
    )
    torch.testing.assert_close(found.double(), expected, **close)
