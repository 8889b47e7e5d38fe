"""How far a step moves the distributions of a policy gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.objective.graph import (
    Edge,
    Stops,
)
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.local_curvature import (
    Categorical,
    LocalCurvature,
)
from einconv_kfac.curvature.objective.loss_graph import LossGraph
from einconv_kfac.curvature.objective.magnitudes import BinaryMagnitude
from einconv_kfac.curvature.objective.policy_samples import Terms, scores_of
from einconv_kfac.curvature.objective.terms import Term


class Policy(Protocol):
    """Distributions whose logarithms enter a loss with weights of both signs."""

    def divergence(self, changes: Mapping[Edge, Tensor]) -> Tensor:
        """Return the sum of ``KL(before, after)`` over the distributions that count, in float64.

        Their number follows it, ``[2]``. Those without a weight, as of masked tokens, do not count.

        Args:
            changes: The changes of earlier tensors.
        """


@dataclass(frozen=True)
class ClassPolicy:
    """Distributions over classes.

    Args:
        scores: The derivative of their scores by earlier tensors.
        before: The distributions in the recorded pass, with the weight of each.
    """

    scores: LinearMap
    before: Categorical

    def divergence(self, changes: Mapping[Edge, Tensor]) -> Tensor:
        """See `Policy`."""
        dim, counts = self.before.dim, self.before.weight.squeeze(self.before.dim) != 0
        change, p = self.scores(changes), self.before.p.double()
        total = counts.sum().double()
        if change is None:
            return torch.stack([torch.zeros_like(total), total])
        centred = change.double() - (p * change.double()).sum(dim, keepdim=True)
        found = torch.logsumexp(p.log() + centred, dim)
        return torch.stack([found.where(counts, 0).sum(), total])


@dataclass(frozen=True)
class BinaryPolicy:
    """Bernoulli distributions by their scores.

    Args:
        scores: The derivative of the scores by earlier tensors.
        before: The distributions in the recorded pass.
    """

    scores: LinearMap
    before: BinaryMagnitude

    def divergence(self, changes: Mapping[Edge, Tensor]) -> Tensor:
        """See `Policy`."""
        change, scores, counts = self.scores(changes), self.before.scores, self.before.values != 0
        total = counts.sum().double()
        if change is None:
            return torch.stack([torch.zeros_like(total), total])
        change, scores = change.double(), scores.double()
        grown = functional.softplus(scores + change) - functional.softplus(scores)
        found = grown - scores.sigmoid() * change
        return torch.stack([found.where(counts, 0).sum(), total])


@dataclass(frozen=True)
class SampledPolicy:
    """Distributions of which the logarithms of densities at samples are known.

    Args:
        logarithms: The derivative of the logarithms by earlier tensors.
        counts: Whether each has a weight in the loss.
    """

    logarithms: LinearMap
    counts: Tensor

    def divergence(self, changes: Mapping[Edge, Tensor]) -> Tensor:
        """See `Policy`; ``exp(d) - 1 - d`` for the change ``d`` of a logarithm.

        It is not negative, and its mean over samples of the distribution before is the divergence.
        """
        change, total = self.logarithms(changes), self.counts.sum().double()
        if change is None:
            return torch.stack([torch.zeros_like(total), total])
        found = torch.expm1(change.double()) - change.double()
        return torch.stack([found.where(self.counts, 0).sum(), total])


def policies_of(
    classes: Terms,
    samples: Iterable[Term],
    known: Iterable[Term],
    graph: LossGraph,
    stops: Stops,
) -> Iterator[Policy]:
    """Yield the policies of a loss.

    Args:
        classes: See `sample_terms`.
        samples: What that returned.
        known: The terms that rules give, among them single samples with positive weights.
        graph: The graph of the loss, which must exist.
        stops: Whether a tensor's change is given.
    """
    found = scores_of(classes, graph)
    if any(_is_single(own) for own in found.values()):
        single = [(term, ()) for term in known if _is_single(term.curvature)]
        found = scores_of(single, graph) | found
    for edge, own in found.items():
        map_ = LinearMap(edge, graph.nodes, stops)
        if isinstance(own, BinaryMagnitude):
            yield BinaryPolicy(map_, own)
        else:
            yield ClassPolicy(map_, own)
    for term in samples:
        (edge,), counts = term.argument, term.curvature.support() != 0
        yield SampledPolicy(LinearMap(edge, graph.nodes, stops), counts)


def _is_single(curvature: LocalCurvature) -> bool:
    """Return whether a curvature is that of one distribution over classes."""
    return isinstance(curvature, Categorical) and curvature.weight.numel() == 1
