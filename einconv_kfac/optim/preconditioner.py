"""A model's running Kronecker factors: gathered in backward passes, applied to gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.capture import LayerCapture
from einconv_kfac.curvature.fisher import FisherEstimator
from einconv_kfac.curvature.layers import Layer
from einconv_kfac.curvature.moments import LayerMoments
from einconv_kfac.optim.quadratic import Direction
from einconv_kfac.optim.running import RunningFactors
from einconv_kfac.optim.settings import Settings, is_due


class Preconditioner:
    """Kronecker-factored curvature of the layers of a model.

    Args:
        layers: The layers to cover.
        estimator: Which Fisher is estimated.
        settings: Decay and periods.
        generator: For sampled targets.
    """

    def __init__(
        self,
        layers: list[Layer],
        estimator: FisherEstimator,
        settings: Settings,
        generator: Generator,
    ) -> None:
        self.capture = LayerCapture([(layer.name, layer.module) for layer in layers])
        self._running = {layer.name: RunningFactors(layer) for layer in layers}
        self._estimator = estimator
        self._settings = settings
        self._generator = generator
        self._generator_before = generator.get_state()
        self._moments: dict[str, LayerMoments] = {}
        self._factor_step: int | None = None
        self._inverse_step: int | None = None

    def weights(self) -> dict[str, str]:
        """Return the name of the weight by layer."""
        return {name: running.layer.weight for name, running in self._running.items()}

    def prepare(self, step: int) -> None:
        """Drop what was gathered, and decide whether to gather for ``step``."""
        self._moments = {}
        self._generator_before = self._generator.get_state()
        self.capture.take()
        period = self._settings.factor_update_period
        self.capture.enabled = is_due(step, self._factor_step, period)

    def gather(self, output: Tensor, target: Tensor, loss: Tensor) -> None:
        """Add a batch to the factors to come, from the graph of its loss."""
        calls = self.capture.take()
        if not calls or not bool(output.isfinite().all()):
            return
        for call in calls:
            if call.layer not in self._moments:
                layer = self._running[call.layer].layer
                self._moments[call.layer] = LayerMoments(layer, self._estimator.approximation)
        self._estimator.add_(self._moments, calls, (output, target, loss), self._generator)

    def gathered(self) -> list[Tensor]:
        """Return the sums that were gathered."""
        return [part for moments in self._moments.values() for part in moments.sums()]

    def discard(self) -> None:
        """Forget what was gathered since the last step, as if it had not been seen."""
        self._generator.set_state(self._generator_before)

    def update_(self, step: int) -> None:
        """Move the running averages by what was gathered."""
        for name, moments in self._moments.items():
            a, b = self._estimator.factors(moments)
            scale = self._estimator.scale(moments.examples)
            self._running[name].update_(a, b.mul_(scale), self._settings.factor_decay)
        if self._moments:
            self._factor_step = step

    def invert_(self, step: int, damping: dict[str, float]) -> None:
        """Recompute the inverses where they are due, with a damping per layer.

        Raises:
            RuntimeError: If no factors were ever gathered, or a damped factor is singular.
        """
        if self._factor_step is None and self._running:
            raise RuntimeError(
                "`step` needs the factors of at least one batch, but `loss_fn` never saw one. "
                "Compute the loss as `loss_fn(model(x), y)` with the module given to KFAC and "
                "backpropagate it."
            )
        if not is_due(step, self._inverse_step, self._settings.inverse_update_period):
            return
        inverses = {name: r.inverted(damping[name]) for name, r in self._running.items()}
        for name, running in self._running.items():
            running.inverses = inverses[name]
        self._inverse_step = step

    def apply(self, gradient: Direction) -> Direction:
        """Return the preconditioned gradient of the parameters that have inverses."""
        result: Direction = {}
        for running in self._running.values():
            if running.inverses is not None and running.layer.weight in gradient:
                result.update(running.apply(gradient))
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and numbers."""
        return {
            "layers": {name: running.state_dict() for name, running in self._running.items()},
            "generator": self._generator.get_state(),
            "factor_step": self._factor_step,
            "inverse_step": self._inverse_step,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ``ValueError`` if a state belongs to other layers."""
        missing = self._running.keys() ^ state["layers"].keys()
        if missing:
            raise ValueError(f"`state_dict` must have the model's layers, differs in {missing}.")
        for name, running in self._running.items():
            running.check_state(state["layers"][name])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        for name, running in self._running.items():
            running.load_state_dict(state["layers"][name])
        self._generator.set_state(state["generator"].cpu())
        self._factor_step = state["factor_step"]
        self._inverse_step = state["inverse_step"]


def generator_for(model: nn.Module, seed: int) -> Generator:
    """Return a generator of its own on the model's device."""
    device = next(model.parameters()).device
    return torch.Generator(device).manual_seed(seed)
