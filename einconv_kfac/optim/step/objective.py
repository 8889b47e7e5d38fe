"""The objective of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from einconv_kfac.optim.hyperparameters import GroupSettings
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.quadratic_model import QuadraticModel, quadratic_model
from einconv_kfac.optim.vectors import Direction, sum_of

Memory: TypeAlias = Mapping[str, dict[str, Any]]
"""What the optimizer keeps by parameter name: its state, as torch calls it."""
Statistics: TypeAlias = Mapping[str, float | Tensor]
"""What a step did; tensors are numbers on the device that nobody has asked for yet."""


@dataclass(frozen=True)
class Objective:
    """The objective of one step: its batches, and what is known at the parameters.

    Args:
        batches: The recorded batches.
        parameters: Parameters by name.
        gradient: Gradient by name, weight decay included.
        decay: Weight decay by name.
        rates: Learning rate by name.
        momenta: Momentum by name, ``None`` for the optimizer's.
        others: Directions of ascent of the parameters without Kronecker factors.
    """

    batches: Sequence[Batch]
    parameters: Direction
    gradient: Direction
    decay: Mapping[str, float]
    rates: Mapping[str, float]
    momenta: Mapping[str, float | None]
    others: Direction

    def model(self, replay: Replay, directions: Sequence[Direction]) -> QuadraticModel:
        """Return the quadratic model in the span of directions."""
        point = (self.parameters, self.gradient, self.decay)
        return quadratic_model(replay, self.batches, point, directions)

    def momentum(self, default: float | None) -> float | None:
        """Return the momentum of all parameters.

        Raises:
            ValueError: If parameter groups differ in it.
        """
        given = set(self.momenta.values())
        if len(given) > 1:
            raise ValueError(
                "`momentum` must be the same in every parameter group when adaptive=True, got "
                f"{sorted(map(str, given))}. Set it for all groups, or pass adaptive=False."
            )
        own = given.pop() if given else None
        return default if own is None else own

    def check_replay(self, replay: Replay) -> None:
        """Raise a ``RuntimeError`` if a forward pass of the objective is not known.

        The first time, also if the model cannot run again or has no Jacobian-vector products.
        """
        if not self.batches:
            raise RuntimeError(
                "`step` needs the loss it steps on, but none was backpropagated since the last "
                "step that `loss_fn` computed. Compute the loss as `loss_fn(model(x), y)` with "
                "the module given to KFAC, or pass adaptive=False."
            )
        if any(batch.forward is None for batch in self.batches):
            raise RuntimeError(
                "`loss_fn` must be called on the model's output itself (or a tensor of it), or "
                "inside the model, when adaptive=True, got another tensor. Move what happens in "
                "between into the model, or pass adaptive=False."
            )
        replay.check(self.batches, self.parameters, self.gradient)

    def value(self) -> Tensor:
        """Return the objective as it was recorded, for the parameters as they are."""
        return self._with_decay([batch.weight * batch.loss for batch in self.batches])

    def value_again(self, replay: Replay) -> Tensor:
        """Evaluate the objective anew, for the parameters as they are."""
        return self._with_decay([b.weight * replay.batch_loss(b) for b in self.batches])

    def _with_decay(self, losses: Sequence[Tensor]) -> Tensor:
        """Add the weight decay's part to losses."""
        norms = [
            0.5 * weight * self.parameters[name].double().square().sum()
            for name, weight in self.decay.items()
            if weight
        ]
        return sum_of([*(loss.double() for loss in losses), *norms])


def at_parameters(
    groups: Sequence[dict[str, Any]],
    names: Mapping[nn.Parameter, str],
    scale: Tensor | None,
    decoupled: bool,
) -> tuple[Objective, dict[str, GroupSettings]]:
    """Return an objective without batches, from the gradients there are, and all settings.

    Args:
        groups: Parameter groups.
        names: Names of their parameters.
        scale: What the gradients are too large by.
        decoupled: Whether weight decay is not part of the objective.
    """
    parameters: Direction = {}
    gradient: Direction = {}
    decay: dict[str, float] = {}
    rates: dict[str, float] = {}
    momenta: dict[str, float | None] = {}
    overrides: dict[str, GroupSettings] = {}
    for group in groups:
        settings = GroupSettings.of(group)
        for parameter in group["params"]:
            overrides[name := names[parameter]] = settings
            if parameter.grad is None:
                continue
            parameters[name], momenta[name] = parameter, settings.momentum
            decay[name] = 0.0 if decoupled else settings.weight_decay
            rates[name] = settings.lr
            gradient[name] = parameter.grad if scale is None else parameter.grad / scale
            if decay[name]:
                gradient[name] = gradient[name].add(parameter, alpha=decay[name])
    return Objective([], parameters, gradient, decay, rates, momenta, {}), overrides


def rescaled(batches: Sequence[Batch], scale: Tensor | None, reduction: str) -> list[Batch]:
    """Undo a gradient scaler's factor in the weights of batches.

    Args:
        batches: The batches.
        scale: The factor, or ``None`` if the gradients were unscaled before the step: the
            objective is then taken to be the mean or the sum of the recorded losses.
        reduction: ``"mean"`` or ``"sum"``.
    """
    if not batches:
        return []
    if scale is None:
        total = sum_of([batch.weight for batch in batches])
        scale = total if reduction == "mean" else total / len(batches)
    return [replace(batch, weight=batch.weight / scale.to(batch.weight)) for batch in batches]


def following_(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Move what is remembered of a parameter to its device and dtype, which may have changed."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.to(parameter)
    return state
