"""A comparison of a model's Kronecker factors with its exact Gauss-Newton matrix, by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.blocks.block_diagonal import KroneckerFactors
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.estimation.estimate import Kind, kronecker_factors
from einconv_kfac.curvature.estimation.forward import Forward, evaluated
from einconv_kfac.curvature.estimation.preservation import undisturbed
from einconv_kfac.curvature.factors.approximation import Approximation
from einconv_kfac.curvature.layers.coverage import Coverage, coverage
from einconv_kfac.curvature.losses import canonical_scores, loss_rule
from einconv_kfac.curvature.losses.loss_call import targets_of
from einconv_kfac.curvature.module_arguments import check_module
from einconv_kfac.curvature.text_table import table
from einconv_kfac.distributed.wrappers import unwrapped
from einconv_kfac.torch_versions import load_forward_mode

_JACOBIAN_ENTRIES = 1 << 26
"""Number of entries of the gradients that are held at a time; one layer may have more."""


@dataclass(frozen=True)
class LayerVerification:
    """A comparison of a layer's block ``K`` with its exact GGN block ``G``.

    Norms, products and traces are sums over channel groups.

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
        loss_scale: The loss Hessian at the output along a random vector, from root vectors,
            divided by the same from autograd. It is 1 if the rule describes the loss, its
            weights and its reduction. For probabilities and log-probabilities (``BCELoss``,
            ``NLLLoss``, ``KLDivLoss``) both are by the scores, where the Fisher information is
            the Hessian. NaN if autograd finds no curvature.
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
    Hessian. It uses ordinary weight gradients and no code of the layers' rules. A few examples
    are enough. The comparison omits blocks between channel groups, which no factor describes.

    Args:
        model: See `kronecker_factors`, as for the arguments that follow.
        loss_fn: See `kronecker_factors`; a rule must cover it.
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
    check_module(model, "verify(model, loss_fn, batch)")
    model = unwrapped(model)
    options: dict[str, Any] = {"approximation": approximation, "kind": kind, "forward": forward}
    factors = kronecker_factors(model, loss_fn, [batch], fisher="exact", **options)
    with undisturbed(model), torch.enable_grad():
        evaluation = evaluated(model, loss_fn, batch, forward)
        output, target = evaluation.output, evaluation.target
        roots = list(loss_rule(loss_fn).roots(loss_fn, output.detach(), target))
        scale = _loss_scale(loss_fn, output.detach(), target, roots)
        parameters = dict(model.named_parameters())
        rows: list[LayerVerification] = []
        for names in _held_together(factors, len(roots) * len(output)):
            layouts = [factors[name].layout for name in names]
            jacobians = _jacobian_rows(output, roots, layouts, parameters)
            rows += [_compared(n, factors[n], j) for n, j in zip(names, jacobians)]
    return Verification(tuple(rows), scale, coverage(model).gaps())


def _held_together(factors: KroneckerFactors, rows: int) -> Iterator[list[str]]:
    """Yield lists of layers whose gradients are held at a time, ``rows`` of each layer."""
    names: list[str] = []
    held = 0
    for name, block in factors.items():
        size = rows * prod(block.layout.shape)
        if names and held + size > _JACOBIAN_ENTRIES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _jacobian_rows(
    output: Tensor,
    roots: Sequence[Tensor],
    layouts: Sequence[Layout],
    parameters: dict[str, nn.Parameter],
) -> list[Tensor]:
    """Return the gradients of every example along every root vector, ``[(v n), g, co, d]``.

    The GGN block of each layout is the sum of their outer products. Root vectors that are zero are
    left out; a loss without curvature leaves one row of zeros.
    """
    names = [name for layout in layouts for name in layout.parameters]
    own = [parameters[name] for name in names]
    found: list[list[Tensor]] = [[] for _ in layouts]
    for root, example in product(roots, range(len(output))):
        masked = torch.zeros_like(root)
        masked[example] = root[example]
        if not bool(masked.any()):
            continue
        gradients = torch.autograd.grad(output, own, masked, retain_graph=True)
        vector = dict(zip(names, gradients))
        for rows, layout in zip(found, layouts):
            rows.append(layout.to_matrix(vector))
    return [
        torch.stack(rows) if rows else own[0].new_zeros(1, *layout.shape)
        for rows, layout in zip(found, layouts)
    ]


def _compared(name: str, block: Any, rows: Tensor) -> LayerVerification:
    """Compare a block with the sum of the rows' outer products, in float64."""
    block, rows = block.to(torch.float64), rows.double()
    per_group = rows.flatten(2).transpose(0, 1)  # g (v n) (co d)
    exact = (per_group @ per_group.mT).square().sum()
    inner = (rows * block.matmul(rows)).sum()
    approximate = block.frobenius_norm() ** 2
    error = (approximate - 2 * inner + exact).clamp_min(0).sqrt()
    return LayerVerification(
        name,
        float(error / exact.sqrt()) if error else 0.0,
        _ratio(inner, (approximate * exact).sqrt()),
        _ratio(block.trace(), rows.square().sum()),
    )


def _ratio(value: Tensor, reference: Tensor) -> float:
    """Return a ratio, which is 1 for two zeros."""
    return 1.0 if value == reference else float(value / reference)


def _loss_scale(loss_fn: nn.Module, output: Tensor, target: Any, roots: Sequence[Tensor]) -> float:
    """Return ``u^T H u`` from root vectors over the same from autograd, for random signs ``u``.

    ``H`` is the Hessian by scores of which the output is a function; for most losses they are
    the output.
    """
    scores, link = canonical_scores(loss_fn, output, target)
    generator = torch.Generator(output.device).manual_seed(0)
    signs = torch.randint(2, output.shape, generator=generator, device=output.device)
    u = (2 * signs - 1).to(output.dtype)
    load_forward_mode()
    tangent = torch.func.jvp(link, (scores,), (u,))[1]
    products = torch.stack([(root * tangent).reshape(len(u), -1).sum(1) for root in roots])
    entries = scores.detach().requires_grad_()
    value = loss_fn.forward(link(entries), *targets_of(target))
    (slope,) = torch.autograd.grad(value, entries, create_graph=True)
    if not slope.requires_grad:
        return float("nan")
    (product,) = torch.autograd.grad(slope, entries, u)
    expected = float((product.detach() * u).sum())
    return float(products.square().sum()) / expected if expected else float("nan")


def _number(value: float) -> str:
    """Return a number as text for a table."""
    return f"{value:.4f}"
