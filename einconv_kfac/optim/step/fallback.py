"""Directions of the parameters that no Kronecker factor covers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from einconv_kfac.optim.arguments import choice
from einconv_kfac.optim.vectors import Direction, precise

FallbackKind: TypeAlias = Literal["adam", "gradient"]
ADAM_DECAYS = (0.9, 0.999)
DECAYS_WITHOUT_MOMENTUM = (0.0, 0.999)
"""For the automatic step, which has a momentum of its own: along averages of old gradients its
quadratic model let parameters run away once the gradient had become small."""
ADAM_EPSILON = 1e-8
AVERAGES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fallback:
    """How parameters without factors are trained.

    Args:
        kind: ``"gradient"``, or ``"adam"`` for ``m / (sqrt(v) + eps)`` with the bias-corrected
            exponential moving averages ``m`` of gradients and ``v`` of their squares (Kingma
            and Ba, 2015). They are kept in float32 at least; a complex parameter counts as its
            real and its imaginary part.
        decays: Decays of ``m`` and ``v``. With a first of 0, the direction is one of ascent.

    Raises:
        ValueError: If it is another kind.
    """

    kind: FallbackKind
    decays: tuple[float, float] = ADAM_DECAYS

    def __post_init__(self) -> None:
        choice("fallback", self.kind, get_args(FallbackKind))

    @staticmethod
    def of(kind: FallbackKind | None, adaptive: bool) -> Fallback:
        """Return the fallback of a mode, of the mode's default kind for ``None``."""
        default: FallbackKind = "adam" if adaptive else "gradient"
        decays = DECAYS_WITHOUT_MOMENTUM if adaptive else ADAM_DECAYS
        return Fallback(default if kind is None else kind, decays)

    def directions(
        self, gradient: Direction, memory: Mapping[str, dict[str, Any]]
    ) -> tuple[Direction, dict[str, dict[str, Any]]]:
        """Return directions of ascent, and the state to keep if the step is taken.

        Args:
            gradient: Gradients by parameter name.
            memory: The optimizer's state, by parameter name.
        """
        if self.kind == "gradient":
            return dict(gradient), {}
        moments = {n: _moments(memory[n], g, self.decays) for n, g in gradient.items()}
        return {name: _adam(own, self.decays) for name, own in moments.items()}, moments

    @property
    def has_momentum(self) -> bool:
        """Whether the directions average gradients, so that no other momentum is added."""
        return self.kind == "adam"


def restore_precision_(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Take over the state of parameters in low precision again, in the precision it is kept in.

    ``torch.optim.Optimizer.load_state_dict`` has rounded it to the parameters' data type.

    Args:
        optimizer: The optimizer, which has loaded the state.
        state: The state.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters):
        if (dtype := precise(parameter.dtype)) == parameter.dtype:
            continue
        for key, value in state["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                optimizer.state[parameter][key] = value.to(parameter.device, dtype, copy=True)


def _moments(
    state: Mapping[str, Any], gradient: Tensor, decays: tuple[float, float]
) -> dict[str, Any]:
    """Return the moving averages after one more gradient."""
    new: dict[str, Any] = {"step": state.get("step", 0) + 1}
    gradient = gradient.to(precise(gradient.dtype))
    for name, decay, value in zip(AVERAGES, decays, (gradient, _by_part(_square, gradient))):
        before = state[name] if name in state else torch.zeros_like(value)
        new[name] = before.lerp(value, 1 - decay)
    return new


def _adam(moments: Mapping[str, Any], decays: tuple[float, float]) -> Tensor:
    """Return Adam's direction."""
    mean, square = (
        moments[name] / (1 - decay ** moments["step"]) for name, decay in zip(AVERAGES, decays)
    )
    return _by_part(_normalized, mean, square)


def _square(gradient: Tensor) -> Tensor:
    """Return the squares of entries."""
    return gradient.square()


def _normalized(mean: Tensor, square: Tensor) -> Tensor:
    """Return ``m / (sqrt(v) + eps)``."""
    direction: Tensor = mean / (square.sqrt() + ADAM_EPSILON)
    return direction


def _by_part(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function of real entries; to the real and the imaginary part of complex ones."""
    if not tensors[0].is_complex():
        return function(*tensors)
    parts = (torch.view_as_real(tensor.resolve_conj()) for tensor in tensors)
    return torch.view_as_complex(function(*parts))
