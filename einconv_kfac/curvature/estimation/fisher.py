"""Estimators of the Fisher information of a loss, batch by batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.estimation.capture import LayerCall, call_gradients
from einconv_kfac.curvature.estimation.forward import Evaluation
from einconv_kfac.curvature.estimation.moments import LayerMoments, Moments
from einconv_kfac.curvature.factors.approximation import Approximation
from einconv_kfac.curvature.losses import check_reduction, loss_rule

Fisher: TypeAlias = Literal["mc", "empirical", "exact", "forward-only"]


@dataclass(frozen=True)
class FisherEstimator:
    """The Fisher information of a loss, and the approximation of weight sharing.

    Args:
        loss_fn: The loss module.
        fisher: ``"mc"`` draws root vectors of the loss Hessian, as from targets sampled from
            the model; ``"exact"`` takes every direction of the loss Hessian; ``"empirical"``
            takes the given targets; ``"forward-only"`` sets ``B`` to the identity.
        mc_samples: Number of samples per example for ``"mc"``.
        approximation: ``"expand"`` or ``"reduce"``.

    Raises:
        ValueError: If an argument is not one of these, or no rule covers the loss.
    """

    loss_fn: nn.Module
    fisher: Fisher = "mc"
    mc_samples: int = 1
    approximation: Approximation = "expand"

    def __post_init__(self) -> None:
        for name, kinds in (("fisher", Fisher), ("approximation", Approximation)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(kinds):
                raise ValueError(f"`{name}` must be one of {get_args(kinds)}, got {value!r}.")
        if not isinstance(self.mc_samples, int) or isinstance(self.mc_samples, bool):
            raise ValueError(f"`mc_samples` must be an integer, got {self.mc_samples!r}.")
        if self.mc_samples < 1:
            raise ValueError(f"`mc_samples` must be at least 1, got {self.mc_samples}.")
        if self.mc_samples > 1 and self.fisher != "mc":
            raise ValueError(
                f"`mc_samples` must be 1 for fisher={self.fisher!r}, which draws no samples, got "
                f"{self.mc_samples}. Leave it out, or pass fisher='mc'."
            )
        if self.fisher in {"mc", "exact"}:
            loss_rule(self.loss_fn)
        check_reduction(self.loss_fn)

    def scale(self, examples: int) -> float:
        """Return the factor of ``B (x) A``: 1 for a mean loss, ``examples`` for a sum."""
        return 1.0 if check_reduction(self.loss_fn) == "mean" else float(examples)

    def factors(self, moments: LayerMoments) -> tuple[Tensor, Tensor]:
        """Return a layer's ``A [g, d, d]`` and ``B [g, co, co]``."""
        return moments.factors()

    def add_(
        self,
        moments: Mapping[str, Moments],
        calls: Sequence[LayerCall],
        evaluation: Evaluation,
        generator: Generator,
    ) -> None:
        """Add one batch to the moments.

        Args:
            moments: By layer name.
            calls: The calls of the layers in the forward pass.
            evaluation: Model output, target, and the loss of the two.
            generator: Draws the samples for ``"mc"``; the global random state does not change.
        """
        if self.fisher == "forward-only":
            for name, own in _by_layer(calls).items():
                moments[name].add_inputs_(own)
            return
        output, _, loss = evaluation
        source = loss if self.fisher == "empirical" else output
        used: list[LayerCall] | None = None
        for root in self._roots(evaluation, generator):
            found = call_gradients(source, root, calls if used is None else used)
            if used is None:
                used = [call for call, gradient in zip(calls, found) if gradient is not None]
                for name, own in _by_layer(used).items():
                    moments[name].add_inputs_(own)
            self._add_root_(moments, used, [g for g in found if g is not None])

    def _add_root_(
        self, moments: Mapping[str, Moments], calls: Sequence[LayerCall], found: Sequence[Tensor]
    ) -> None:
        """Add the gradients of one root vector, scaled to those of the examples' own losses."""
        gradients = {id(call): gradient for call, gradient in zip(calls, found)}
        mean = check_reduction(self.loss_fn) == "mean"
        power = 2 if self.fisher == "empirical" else 1
        for name, own in _by_layer(calls).items():
            scale = float(own[0].x.shape[0] ** power) if mean else 1.0
            moments[name].add_gradients_(own, [gradients[id(call)] for call in own], scale)

    def _roots(self, evaluation: Evaluation, generator: Generator) -> Iterator[Tensor]:
        """Yield the vectors that are backpropagated, from the output or from the loss."""
        output, target, loss = evaluation
        if self.fisher == "empirical":
            yield torch.ones_like(loss)
        elif self.fisher == "exact":
            yield from loss_rule(self.loss_fn).roots(self.loss_fn, output.detach(), target)
        else:
            rule, detached = loss_rule(self.loss_fn), output.detach()
            for _ in range(self.mc_samples):
                root = rule.sample(self.loss_fn, detached, target, generator)
                yield root if self.mc_samples == 1 else root * self.mc_samples**-0.5


def _by_layer(calls: Sequence[LayerCall]) -> dict[str, list[LayerCall]]:
    """Return the calls by the name of their layer."""
    result: dict[str, list[LayerCall]] = defaultdict(list)
    for call in calls:
        result[call.layer].append(call)
    return result
