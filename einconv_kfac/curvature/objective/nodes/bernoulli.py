"""Cross entropies of Bernoulli distributions, whose target may depend on the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.objective.local_curvature import LocalCurvature
from einconv_kfac.curvature.objective.nodes.elementary import WithTarget, diagonal


@dataclass(frozen=True)
class BernoulliLoss(WithTarget):
    """A loss of its input and its target; both depend on the model in the entropy of `Bernoulli`.

    With the magnitudes of weights of both signs, the Hessian by the scores is the Fisher
    information of a policy.
    """

    def curvature(
        self, node: Any, inputs: Sequence[Tensor | None], weight: Tensor
    ) -> LocalCurvature | None:
        """See `NodeRule`; unknown if the target depends on parameters."""
        function, (x, target) = self.function(node), inputs
        assert function is not None
        assert x is not None
        if node.next_functions[1][0] is not None:
            return None
        return diagonal(lambda entries: function(entries, target), x, weight)


RULES = (
    BernoulliLoss(
        "BinaryCrossEntropy", functional.binary_cross_entropy, options=("weight", "reduction")
    ),
    BernoulliLoss(
        "BinaryCrossEntropyWithLogits",
        functional.binary_cross_entropy_with_logits,
        options=("weight", "pos_weight", "reduction"),
    ),
)
