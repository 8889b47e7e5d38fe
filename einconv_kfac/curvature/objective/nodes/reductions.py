"""Norms, extrema and losses over several entries, whose Hessian is taken to be unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.objective.local_curvature import LocalCurvature
from einconv_kfac.curvature.objective.node_rule import Function
from einconv_kfac.curvature.objective.nodes.elementary import saved_options


@dataclass(frozen=True)
class Reduction:
    """An operation over several entries of its input.

    Args:
        kind: See `NodeRule`.
        apply: The operation.
        options: Names of arguments that the node saves.
        saved: The name under which the node saves the input.
    """

    kind: str
    apply: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    saved: str = "self"

    def is_linear(self, dependent: Sequence[bool]) -> bool:
        """See `NodeRule`."""
        return False

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        value = getattr(node, f"_saved_{self.saved}", None)
        return [None if value is None else value.detach()]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        if getattr(node, f"_saved_{self.saved}", None) is None:
            return None
        return partial(self.apply, **saved_options(node, self.options))

    def curvature(
        self, node: Any, inputs: Sequence[Tensor | None], weight: Tensor
    ) -> LocalCurvature | None:
        """See `NodeRule`."""
        return None


@dataclass(frozen=True)
class Extremum(Reduction):
    """The largest or smallest entries, whose node keeps no input where it is along a dimension."""

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`; the indices are left out."""
        known = hasattr(node, "_saved_dim")
        return partial(self.apply, **saved_options(node, ("dim", "keepdim") if known else ()))


def _ctc_losses(*args: Any, **kwargs: Any) -> Tensor:
    """Return the losses of sequences, without the intermediate results that torch returns."""
    losses: Tensor = torch.ops.aten._ctc_loss(*args, **kwargs)[0]
    return losses


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
    Reduction("Prod", torch.prod),
    Reduction("Cumprod", torch.cumprod, ("dim",)),
    Reduction("Glu", functional.glu, ("dim",)),
    Reduction(
        "MaxPool2DWithIndices",
        functional.max_pool2d,
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    ),
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
