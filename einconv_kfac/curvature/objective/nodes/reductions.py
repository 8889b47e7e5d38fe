"""Norms, extrema and losses over several entries, whose Hessian is taken to be unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.objective.graph import inputs_of, kind_of_node, zeros_at
from einconv_kfac.curvature.objective.node_rule import Function, NodeRule
from einconv_kfac.curvature.objective.nodes.elementary import saved_options


@dataclass(frozen=True)
class Reduction(NodeRule):
    """An operation over several entries of its input.

    Args:
        kind: See `NodeRule`.
        apply: The operation.
        options: Names of arguments that the node saves.
        saved: The name under which the node saves the input.
    """

    kind: str
    apply: Callable[..., Any]
    options: tuple[str, ...] = ()
    saved: str = "self"

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        value = getattr(node, f"_saved_{self.saved}", None)
        return [None if value is None else value.detach()]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        if getattr(node, f"_saved_{self.saved}", None) is None:
            return None
        return partial(self.apply, **saved_options(node, self._present(node)))

    def _present(self, node: Any) -> tuple[str, ...]:
        """Return the names of those arguments that this form of the operation has."""
        return tuple(name for name in self.options if hasattr(node, f"_saved_{name}"))


@dataclass(frozen=True)
class Extremum(Reduction):
    """The largest or smallest entries, whose node keeps no input where it is along a dimension."""

    options: tuple[str, ...] = ("dim", "keepdim")

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`; the indices are left out."""
        return partial(self.apply, **saved_options(node, self._present(node)))


@dataclass(frozen=True)
class Selection(Reduction):
    """Entries at indices that the node saves, which stay selected as they were.

    The node saves neither its input, for which zeros stand, nor by which rule it selects. A form
    without a dimension saves its input, and is evaluated again.
    """

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        if not is_selection(node):
            return super().inputs(node)
        edge = inputs_of(node)[0]
        return [None if edge is None else zeros_at(edge)]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        return fixed_selection(node) if is_selection(node) else super().function(node)


def is_selection(node: Any) -> bool:
    """Return whether a node selects entries of its input, and saves which these are."""
    rule = BY_KIND.get(kind_of_node(node))
    return isinstance(rule, (Extremum, Selection)) and hasattr(node, "_saved_indices")


def keeps_selection(node: Any) -> bool:
    """Return whether a selection stays what it was where the node is evaluated again."""
    return isinstance(BY_KIND.get(kind_of_node(node)), Selection) and is_selection(node)


def fixed_selection(node: Any) -> Function:
    """Return what takes the entries of another input that a node selected."""
    return partial(
        _selected,
        dim=saved_options(node, ("dim",))["dim"],
        indices=node._saved_indices,
        keepdim=getattr(node, "_saved_keepdim", True),
    )


def _selected(x: Tensor, dim: int, indices: Tensor, keepdim: bool) -> Tensor:
    """Return the entries at indices along a dimension, which is kept or not."""
    if keepdim:
        return x.gather(dim, indices)
    return x.gather(dim, indices.unsqueeze(dim)).squeeze(dim)


def _log_of_determinant(x: Tensor) -> Tensor:
    """Return the logarithm of the absolute value of a determinant."""
    found: Tensor = torch.linalg.slogdet(x)[1]
    return found


def _ctc_losses(*args: Any, **kwargs: Any) -> Tensor:
    """Return the losses of sequences, without the intermediate results that torch returns."""
    losses: Tensor = torch.ops.aten._ctc_loss(*args, **kwargs)[0]
    return losses


_WINDOWS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
RULES = (
    Reduction("LinalgVectorNorm", torch.linalg.vector_norm, ("ord", "dim", "keepdim")),
    Reduction("Norm", torch.norm, ("p", "dim", "keepdim")),
    Reduction("Nansum", torch.nansum, ("dim", "keepdim")),
    Reduction("Var", torch.var, ("dim", "correction", "keepdim")),
    Reduction("Std", torch.std, ("dim", "correction", "keepdim")),
    Reduction("Amax", torch.amax, ("dim", "keepdim")),
    Reduction("Amin", torch.amin, ("dim", "keepdim")),
    Extremum("Max", torch.amax),
    Extremum("Min", torch.amin),
    Selection("Sort", torch.sort),
    Selection("Topk", torch.topk),
    Selection("Kthvalue", torch.kthvalue),
    Selection("Mode", torch.mode),
    Selection("Cummax", torch.cummax),
    Selection("Cummin", torch.cummin),
    Selection("Median", torch.median),
    Selection("Nanmedian", torch.nanmedian),
    Reduction("Prod", torch.prod, ("dim", "keepdim")),
    Reduction("Pdist", functional.pdist, ("p",)),
    Reduction("LinalgDet", torch.linalg.det, saved="A"),
    Reduction("LinalgSlogdet", _log_of_determinant, saved="A", output=1),
    Reduction("LinalgMatrixExp", torch.linalg.matrix_exp),
    Reduction("CholeskyInverse", torch.cholesky_inverse, ("upper",)),
    Reduction("Cumprod", torch.cumprod, ("dim",)),
    Reduction("Glu", functional.glu, ("dim",)),
    Reduction("MaxPool2DWithIndices", functional.max_pool2d, _WINDOWS),
    Reduction("MaxPool3DWithIndices", functional.max_pool3d, _WINDOWS),
    Reduction("Logcumsumexp", torch.logcumsumexp, ("dim",)),
    Reduction(
        "MultiMarginLoss",
        functional.multi_margin_loss,
        ("target", "p", "margin", "weight", "reduction"),
    ),
    Reduction("MultilabelMarginLoss", functional.multilabel_margin_loss, ("target", "reduction")),
    Reduction(
        "CtcLoss",
        _ctc_losses,
        ("targets", "input_lengths", "target_lengths", "blank", "zero_infinity"),
        saved="log_probs",
    ),
)
BY_KIND = {rule.kind: rule for rule in RULES}
"""The rules, by the name of the operation."""
