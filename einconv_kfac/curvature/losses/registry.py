"""Which curvature belongs to which loss.

A loss of ``N`` examples is ``L = sum_j c_j l_j``: independent terms ``l_j`` (one per example,
pixel, token or output entry) with weights ``c_j`` that contain the mean or the sum, class
weights and ignored targets. A rule gives *root vectors* ``s``, shaped like the output, with
``sum_v s_v s_v^T`` equal to the Hessian of ``L`` with respect to the output, exactly or in
expectation. Exact root vectors touch one term of each example, so that none mix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses.classification import CrossEntropyRule, LogLikelihoodRule
from einconv_kfac.curvature.losses.entrywise import EntrywiseRule


class LossRule(Protocol):
    """What curvature needs to know about one type of loss."""

    def roots(self, loss: Any, output: Tensor, target: Any) -> Iterator[Tensor]:
        """Yield root vectors ``[n, *f]`` that reproduce the Hessian at ``output [n, *f]``.

        A root vector holds one vector per example; examples do not mix.
        """

    def sample(self, loss: Any, output: Tensor, target: Any, generator: Generator) -> Tensor:
        """Draw a root vector ``[n, *f]`` whose second moment is the Hessian.

        The global random state must be left alone.
        """


_RULES: list[tuple[type[nn.Module], LossRule]] = [
    (nn.CrossEntropyLoss, CrossEntropyRule()),
    (nn.NLLLoss, LogLikelihoodRule()),
    (nn.MSELoss, EntrywiseRule()),
    (nn.BCEWithLogitsLoss, EntrywiseRule()),
    (nn.PoissonNLLLoss, EntrywiseRule()),
    (nn.GaussianNLLLoss, EntrywiseRule()),
]


def register_loss(kind: type[nn.Module], rule: LossRule) -> None:
    """Use a rule for a type of loss and its subclasses.

    Args:
        kind: The type. Its instances may have a ``reduction``, ``"mean"`` or ``"sum"``;
            without one they are taken to be means over examples.
        rule: Its rule; `EntrywiseRule` serves every loss that is a sum over output entries.

    >>> class LogCosh(nn.Module):
    ...     def forward(self, output, target):
    ...         return (output - target).cosh().log().mean()
    >>> register_loss(LogCosh, EntrywiseRule())
    """
    _RULES.append((kind, rule))


def loss_rule(loss: nn.Module) -> LossRule:
    """Return the rule for a loss; of several, the one registered last.

    Raises:
        ValueError: If no rule covers its type, or its reduction is ``"none"``.
    """
    rule = next((rule for kind, rule in reversed(_RULES) if isinstance(loss, kind)), None)
    if rule is None:
        known = ", ".join(kind.__name__ for kind, _ in _RULES)
        raise ValueError(
            f"`loss_fn` must be one of {known}, got {type(loss).__name__}. fisher='empirical' "
            "takes any loss; `register_loss` makes others known."
        )
    check_reduction(loss)
    return rule


def check_reduction(loss: nn.Module) -> str:
    """Return ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: If the loss has another reduction.
    """
    reduction = getattr(loss, "reduction", "mean")
    if reduction not in {"mean", "sum"}:
        raise ValueError(f"`loss_fn.reduction` must be 'mean' or 'sum', got {reduction!r}.")
    return str(reduction)


def evaluate_loss(loss: nn.Module, output: Tensor, target: Any) -> Tensor:
    """Return the loss; a tuple of targets (a value and its variance) is passed on as such."""
    value: Tensor = loss(output, *(target if isinstance(target, tuple) else (target,)))
    return value
