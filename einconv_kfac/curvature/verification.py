"""A comparison of a model's Kronecker factors with its exact GGN, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.coverage import Coverage, coverage, table
from einconv_kfac.curvature.estimate import (
    Forward,
    Kind,
    evaluated,
    kronecker_factors,
    uncompiled,
)
from einconv_kfac.curvature.layout import Layout
from einconv_kfac.curvature.losses import loss_rule
from einconv_kfac.curvature.preservation import undisturbed
from einconv_kfac.curvature.rules import Approximation


@dataclass(frozen=True)
class LayerVerification:
    """How a layer's block ``K`` compares with its exact GGN block ``G``, group by group.

    Args:
        layer: The layer's name.
        relative_error: ``|K - G| / |G|`` in the Frobenius norm.
        cosine: ``<K, G> / (|K| |G|)``.
        trace_ratio: ``tr(K) / tr(G)``.
    """

    layer: str
    relative_error: float
    cosine: float
    trace_ratio: float


@dataclass(frozen=True)
class Verification:
    """The comparison for all layers; prints as a table.

    Args:
        layers: One entry per layer.
        loss_scale: The loss Hessian at the output along a random vector, by the root vectors
            over by autograd. It is 1 if the loss, its weights and its reduction are
            understood; NaN for a loss that is linear in the output (``NLLLoss``).
        gaps: Parameters that no block covers.
    """

    layers: tuple[LayerVerification, ...]
    loss_scale: float
    gaps: Coverage

    def __str__(self) -> str:
        rows = [
            (
                row.layer or "(model)",
                *map(_number, (row.relative_error, row.cosine, row.trace_ratio)),
            )
            for row in self.layers
        ]
        text = table(("layer", "relative error", "cosine", "trace ratio"), rows)
        text += f"\nloss scale {self.loss_scale:.6f} (1 is right)"
        return f"{text}\nnot covered:\n{self.gaps}" if self.gaps else text


def verify(
    model: nn.Module,
    loss_fn: nn.Module,
    batch: Any,
    *,
    approximation: Approximation = "expand",
    kind: Kind = "kfac",
    forward: Forward | None = None,
) -> Verification:
    """Compare each layer's block with the exact GGN block on a small batch.

    The exact block comes from one backward pass per example and root vector of the loss
    Hessian, through ordinary weight gradients: it shares no code with the layers' rules. A few
    examples are enough. Blocks between channel groups, which no factor describes, are left out.

    Args:
        model: See `kronecker_factors`, as for the arguments that follow.
        loss_fn: See `kronecker_factors`; its Hessian must be known.
        batch: One batch of data.
        approximation: See `kronecker_factors`.
        kind: See `kronecker_factors`.
        forward: See `kronecker_factors`.

    Raises:
        ValueError: As `kronecker_factors`.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    >>> batch = torch.ones(4, 3).double(), torch.zeros(4, 2).double()
    >>> print(verify(model, nn.MSELoss(), batch))  # exact for linear networks
    layer  relative error  cosine  trace ratio
    0      0.0000          1.0000  1.0000
    1      0.0000          1.0000  1.0000
    loss scale 1.000000 (1 is right)
    """
    model = uncompiled(model)
    options: dict[str, Any] = {"approximation": approximation, "kind": kind, "forward": forward}
    factors = kronecker_factors(model, loss_fn, [batch], fisher="exact", **options)
    with undisturbed(model), torch.enable_grad():
        output, target, _ = evaluated(model, loss_fn, batch, forward)
        roots = list(loss_rule(loss_fn).roots(loss_fn, output.detach(), target))
        scale = _loss_scale(loss_fn, output.detach(), target, roots)
        parameters = dict(model.named_parameters())
        rows = tuple(
            _compared(name, block, _jacobian_rows(output, roots, block.layout, parameters))
            for name, block in factors.items()
        )
    return Verification(rows, scale, coverage(model).gaps())


def _jacobian_rows(
    output: Tensor, roots: Sequence[Tensor], layout: Layout, parameters: dict[str, nn.Parameter]
) -> Tensor:
    """Return the gradients of every example along every root vector, ``[(v n), g, co, d]``.

    The GGN block is the sum of their outer products.
    """
    own = [parameters[name] for name in layout.parameters]
    found = []
    for root in roots:
        for example in range(output.shape[0]):
            masked = torch.zeros_like(root)
            masked[example] = root[example]
            gradients = torch.autograd.grad(output, own, masked, retain_graph=True)
            found.append(layout.to_matrix(dict(zip(layout.parameters, gradients))))
    return torch.stack(found)


def _compared(name: str, block: Any, rows: Tensor) -> LayerVerification:
    """Compare a block with the sum of the rows' outer products, in float64."""
    block, rows = block.to(torch.float64), rows.double()
    per_group = rows.flatten(2).transpose(0, 1)  # g (v n) (co d)
    exact = (per_group @ per_group.mT).square().sum()
    inner = (rows * block.matmul(rows)).sum()
    approximate = block.frobenius_norm() ** 2
    error = (approximate - 2 * inner + exact).clamp_min(0) / exact
    cosine = inner / (approximate * exact).sqrt()
    ratio = block.trace() / rows.square().sum()
    return LayerVerification(name, float(error.sqrt()), float(cosine), float(ratio))


def _loss_scale(loss_fn: nn.Module, output: Tensor, target: Any, roots: Sequence[Tensor]) -> float:
    """Return ``u.H.u`` by the root vectors over that by autograd, for random signs ``u``."""
    generator = torch.Generator(output.device).manual_seed(0)
    signs = torch.randint(2, output.shape, generator=generator, device=output.device)
    u = (2 * signs - 1).to(output.dtype)
    products = torch.stack([(root * u).reshape(len(u), -1).sum(1) for root in roots])
    entries = output.detach().requires_grad_()
    targets = target if isinstance(target, tuple) else (target,)
    (slope,) = torch.autograd.grad(loss_fn.forward(entries, *targets), entries, create_graph=True)
    if not slope.requires_grad:
        return float("nan")
    (product,) = torch.autograd.grad(slope, entries, u)
    expected = float((product * u).sum())
    return float(products.square().sum()) / expected if expected else float("nan")


def _number(value: float) -> str:
    """Return a number for a table."""
    return f"{value:.4f}"
