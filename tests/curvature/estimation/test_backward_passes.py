"""Backward passes of several vectors at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.curvature import KroneckerFactors, kronecker_factors
from einconv_kfac.curvature.estimation import backward_passes


class Negated(torch.autograd.Function):
    """The identity with a derivative that reads numbers."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return -gradient if float(gradient.sum()) < 1e9 else gradient


class Small(nn.Module):
    """Two layers.

    Args:
        between: What is between them.
    """

    def __init__(self, between: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
        self.between, self.passes = between, 0

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x)
        if h.requires_grad and self.between == "hook":
            h.register_hook(self._doubled)  # type: ignore[no-untyped-call]
        if h.requires_grad and "count" in self.between:
            h.register_hook(self._counted)  # type: ignore[no-untyped-call]
        if "function" in self.between:
            h = Negated.apply(h)  # type: ignore[no-untyped-call]
        if self.between == "mixed":
            h = h - h.mean(0)
        result: Tensor = self.last(h.tanh())
        return result

    def _counted(self, _: Tensor) -> None:
        """Count a backward pass."""
        self.passes += 1

    def _doubled(self, gradient: Tensor) -> Tensor:
        """Double a gradient that is not too large."""
        self.passes += 1
        return 2 * gradient if float(gradient.abs().sum()) < 1e9 else gradient


def blocks(between: str, **options: object) -> KroneckerFactors:
    """Return the blocks of the model."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (5,), generator=generator)
    return kronecker_factors(Small(between), nn.CrossEntropyLoss(), [(x, y)] * 2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("between", ["nothing", "mixed", "hook", "function"])
@pytest.mark.parametrize(
    "options",
    [
        {"mc_samples": 20},
        {"mc_samples": 20, "approximation": "reduce"},
        {"fisher": "exact"},
        {"mc_samples": 20, "kind": "ekfac"},
        {"fisher": "exact", "kind": "diagonal"},
    ],
)
def test_vectors_together_and_one_by_one(
    between: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = blocks(between, **options)
    monkeypatch.setattr(backward_passes, "_ENTRIES", 1)
    alone = blocks(between, **options)
    for name, block in together.items():
        torch.testing.assert_close(block.to_dense(), alone[name].to_dense(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("between", "passes"), [("count", 1), ("hook", 1 + 19), ("count and function", 19)]
)
def test_number_of_passes(between: str, passes: int) -> None:
    batch = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    models = {samples: Small(between) for samples in (1, 20)}
    for samples, model in models.items():
        kronecker_factors(model, nn.CrossEntropyLoss(), [batch], mc_samples=samples)
    assert models[20].passes - models[1].passes == passes


def test_large_vectors_pass_alone() -> None:
    model = Small("count")
    x, y = torch.randn(30_000, 4, dtype=torch.float64), torch.arange(30_000) % 3
    before = {}
    for samples in (1, 5):
        model.passes = 0
        kronecker_factors(model, nn.CrossEntropyLoss(), [(x, y)], mc_samples=samples)
        before[samples] = model.passes
    assert before[5] - before[1] == 2  # after the first vector, two in each


@pytest.mark.parametrize("options", [{"fisher": "exact"}, {"mc_samples": 5}])
def test_an_optimizer_gives_hooks_one_gradient_at_a_time(options: dict[str, Any]) -> None:
    """What a training script records stays a plain tensor."""
    seen: list[Tensor] = []

    def record(module: nn.Module, args: object, h: Tensor) -> None:
        h.register_hook(seen.append)  # type: ignore[no-untyped-call]

    model, loss_fn = Small("nothing"), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    model.first.register_forward_hook(record)
    loss_fn(model(torch.randn(5, 4, dtype=torch.float64)), torch.arange(5) % 3).backward()
    opt.step()
    assert len(seen) > 2
    assert all(torch.equal(gradient, gradient.clone()) for gradient in seen)
