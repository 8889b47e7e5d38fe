"""The terms of a loss, and what takes the place of curvature where there is none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from einconv_kfac.curvature.objective.bare_entries import places_without_curvature
from einconv_kfac.curvature.objective.densities import WithoutCurvature
from einconv_kfac.curvature.objective.distributions import ENTRIES
from einconv_kfac.curvature.objective.graph import Edge
from einconv_kfac.curvature.objective.hessian import WHOLE
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.local_curvature import Empirical
from einconv_kfac.curvature.objective.loss_account import LossAccount
from einconv_kfac.curvature.objective.terms import Term


@dataclass(frozen=True)
class FoundTerms:
    """The terms of a loss, found when they are first asked for, also after its graph is freed.

    Args:
        find: Finds the terms that have curvature of their own.
        ends: Tensors to which rules may give no curvature in whole or in part, as a map from the
            sources and a gradient.
        without: The operations next to the loss without curvature of their own.
        left_out: The operations without curvature of their own.
        account: Receives what the loss is taken as.
        unbatched: The tensors without a dimension of examples.
        replaced: What identifies the terms of operations that samples of a policy consist of,
            which are left out.
    """

    find: Callable[[], Sequence[Term]]
    ends: Mapping[Edge, tuple[LinearMap, Tensor]]
    without: WithoutCurvature
    left_out: Collection[str]
    account: LossAccount | None
    unbatched: Collection[Edge]
    replaced: Collection[int]

    def __call__(self) -> tuple[Term, ...]:
        """Return the terms, and note what the loss is taken as."""
        return self._noted

    @cached_property
    def _noted(self) -> tuple[Term, ...]:
        """See `__call__`."""
        if self.account is not None:
            is_whole = any(term.name in (WHOLE, ENTRIES) for term in self.all)
            self.account.add_(self.all, () if is_whole else self.left_out)
        return self.all

    @cached_property
    def all(self) -> tuple[Term, ...]:
        """The terms."""
        terms = tuple(term for term in self.find() if id(term) not in self.replaced)
        gradients = {edge: own for edge, (_, own) in self.ends.items()}
        places = places_without_curvature(terms, gradients, self.unbatched)
        if own := [*self.without.terms(places, gradients)]:
            terms = (*terms, *(term for term, _ in own))
            covered = {end for _, inner in own for end in inner}
            places = places_without_curvature(terms, gradients, self.unbatched)
            places = {end: where for end, where in places.items() if end not in covered}
        name = ", ".join(sorted(self.left_out)) or "linear"
        slopes = {edge: gradients[edge].where(own, 0) for edge, own in places.items()}
        if terms:  # of one of several outputs, all of which may be masked
            slopes = {edge: own for edge, own in slopes.items() if bool(own.any())}
        empirical = (
            Term(
                (e,),
                (self.ends[e][0],),
                Empirical(g, self.without.scale(e, g), e in self.unbatched),
                name,
            )
            for e, g in slopes.items()
        )
        return (*terms, *empirical)
