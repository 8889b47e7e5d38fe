"""A pass over data that adds every batch to the moments of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from einconv_kfac.curvature.estimation.capture import LayerCapture
from einconv_kfac.curvature.estimation.fisher import FisherEstimator
from einconv_kfac.curvature.estimation.forward import Forward, evaluation_of
from einconv_kfac.curvature.estimation.moments import Moments
from einconv_kfac.curvature.estimation.other_uses import used_past_calls
from einconv_kfac.curvature.estimation.participation import Counted, Participation
from einconv_kfac.curvature.estimation.preservation import undisturbed
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.curvature.objective.loss_account import LossAccount
from einconv_kfac.distributed.random_streams import stream
from einconv_kfac.distributed.summable import Summable
from einconv_kfac.distributed.workers import ALONE, Workers


class SummableMoments(Moments, Summable, Counted, Protocol):
    """Moments that workers can add up."""


_PARTICIPATION = "."
"""A key beside names of layers, which no module has as its name."""


@dataclass(frozen=True)
class DataPass:
    """Data, and the model that runs on it.

    Args:
        model: The model.
        layers: Its layers.
        data: The batches.
        forward: Runs the model on a batch; ``None`` for batches ``(x, y)``.
        seed: Seed of sampled targets, which are the same in every pass.
        progress: Whether to show a progress bar.
        workers: The workers, each with batches of its own.
    """

    model: nn.Module
    layers: Sequence[Layer]
    data: Iterable[Any]
    forward: Forward | None = None
    seed: int = 0
    progress: bool = False
    workers: Workers = ALONE

    def add_to_(
        self, moments: Mapping[str, SummableMoments], estimator: FisherEstimator
    ) -> Participation:
        """Add every batch of all workers to the moments of each layer, and restore the model.

        Args:
            moments: By layer name.
            estimator: Which Fisher of which loss.

        Returns:
            The numbers of examples that have a part in each layer.
        """
        with self.workers.together():
            participation = self._add_own_to_(moments, estimator)
            sums: dict[str, Summable] = {**moments, _PARTICIPATION: participation}
            self.workers.combined(sums, lambda: sums)
        return participation

    def _add_own_to_(
        self, moments: Mapping[str, SummableMoments], estimator: FisherEstimator
    ) -> Participation:
        """Add every batch of this worker."""
        participation = Participation(moments)
        account = LossAccount()
        with undisturbed(self.model), LayerCapture(self.layers) as capture, torch.enable_grad():
            for index, batch in enumerate(self._batches()):
                given = self.model, estimator.loss_fn, batch, self.forward
                evaluation = evaluation_of(*given, capture.calls, account)
                number, device = self.workers.number(index), evaluation.weight.device
                generator = stream(device, "factors", self.seed, 0, number)
                calls = capture.take()
                before = {name: each.examples for name, each in moments.items()}
                with capture.paused(repeats=True):  # checkpointed layers run again
                    past = used_past_calls(evaluation.outputs, calls, self.layers)
                    own = [call for call in calls if call.layer not in past]
                    if own or not past:
                        estimator.add_(moments, own, evaluation, generator)
                    if past:
                        layers = [layer for layer in self.layers if layer.name in past]
                        estimator.add_weights_(moments, layers, evaluation, generator)
                    participation.add_(moments, before, evaluation)
        return participation

    def _batches(self) -> Iterator[Any]:
        """Iterate over the batches, and show a progress bar if `progress`."""
        total = len(self.data) if isinstance(self.data, Sized) else None
        yield from tqdm(self.data, total=total, desc="factors", disable=not self.progress)
