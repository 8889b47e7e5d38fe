"""What losses are taken as: the operations that their curvature comes from."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

from einconv_kfac.curvature.objective.densities import Information
from einconv_kfac.curvature.objective.local_curvature import Empirical
from einconv_kfac.curvature.objective.magnitudes import BinaryMagnitude, Magnitude
from einconv_kfac.curvature.objective.policy_samples import SampledInformation
from einconv_kfac.curvature.objective.probability_terms import SLOPES
from einconv_kfac.curvature.objective.terms import Term

NO_CURVATURE = (
    "The loss has no curvature that is known at an output of the model ({}). {} takes its place; "
    "`coverage()` shows it. Write a loss that is curved there, as `F.huber_loss(out, y)` in place "
    "of `F.l1_loss(out, y)`, or a module with a rule: `register_loss(type(loss_fn), rule)` of "
    "`einconv_kfac.curvature`."
)
"""The warning about a loss whose curvature is not known."""
_FISHER = "The empirical Fisher of that output, from which steps may be far too long or too short,"
_DENSITIES = "The information of densities exp(-loss / mean loss)"
LINEAR = "the loss is linear in it"


class LossAccount:
    """Keeps what the losses of a model were taken as, and warns of the first one without curvature.

    Attributes:
        lines: A line for each operation that the curvature came from, in the order in which they
            were first seen, and for those that were left out.
    """

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}
        self._is_warned = False

    @property
    def lines(self) -> tuple[str, ...]:
        """See `LossAccount`."""
        return tuple(self._lines)

    def add_rule_(self, loss: object) -> None:
        """Add a loss module that a rule describes."""
        self._lines.setdefault(f"{type(loss).__name__}: by its rule")

    def add_(self, terms: Sequence[Term], left_out: Collection[str]) -> None:
        """Add a loss, and warn if it is the first with an output without known curvature.

        Args:
            terms: Its terms.
            left_out: The nonlinear operations without curvature of their own.
        """
        for term in terms:
            self._lines.setdefault(f"{term.name}: {term.curvature.name}")
        taken = {term.name for term in terms if isinstance(term.curvature, Information)}
        kinds = Magnitude, BinaryMagnitude, SampledInformation, *SLOPES
        magnitudes = {term.name for term in terms if isinstance(term.curvature, kinds)}
        others = ", ".join(sorted({*left_out} - taken - magnitudes))
        is_empirical = any(isinstance(term.curvature, Empirical) for term in terms)
        if (is_empirical or taken) and not self._is_warned:
            self._is_warned = True
            names = others or LINEAR if is_empirical else ", ".join(sorted(taken))
            text = NO_CURVATURE.format(names, _FISHER if is_empirical else _DENSITIES)
            warnings.warn(text, UserWarning, stacklevel=2)
        if others and not is_empirical:
            self._lines.setdefault(f"{others}: without curvature of their own, to first order")
