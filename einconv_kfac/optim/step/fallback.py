"""Directions of the parameters that no Kronecker factor covers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from einconv_kfac.curvature.arguments import choice
from einconv_kfac.optim.factors.finiteness import Finiteness
from einconv_kfac.optim.step.parameter_change import ParameterChange
from einconv_kfac.optim.step.selection import or_others
from einconv_kfac.optim.vectors import Direction, precise

FallbackKind: TypeAlias = Literal["adam", "gradient"]
ADAM_DECAYS = (0.9, 0.999)
DECAYS_WITHOUT_MOMENTUM = (0.0, 0.999)
"""For the automatic step, which has a momentum of its own: along averages of old gradients its
quadratic model let parameters run away once the gradient had become small."""
ADAM_EPSILON = 1e-8
AVERAGES = ("exp_avg", "exp_avg_sq")
COUNT_KEY = "step"
"""Number of gradients in the averages of a parameter, in the optimizer's state."""


@dataclass(frozen=True)
class Fallback:
    """How parameters without factors are trained.

    Args:
        kind: ``"gradient"``, or ``"adam"`` for ``m / (sqrt(v) + eps)`` with the bias-corrected
            exponential moving averages ``m`` of gradients and ``v`` of their squares (Kingma
            and Ba, 2015). They are kept in float32 at least; a complex parameter counts as its
            real and its imaginary part.
        decays: Decays of ``m`` and ``v``. With a first of 0, the direction is one of ascent.
        is_static: Whether the averages stay where they are in memory, and the device counts the
            steps, for CUDA graphs.

    Raises:
        ValueError: If it is another kind.
    """

    kind: FallbackKind
    decays: tuple[float, float] = ADAM_DECAYS
    is_static: bool = False

    def __post_init__(self) -> None:
        choice("fallback", self.kind, get_args(FallbackKind))

    @staticmethod
    def of(kind: FallbackKind | None, adaptive: bool, is_static: bool) -> Fallback:
        """Return the fallback of a mode, of the mode's default kind for ``None``."""
        default: FallbackKind = "adam" if adaptive else "gradient"
        decays = DECAYS_WITHOUT_MOMENTUM if adaptive else ADAM_DECAYS
        return Fallback(default if kind is None else kind, decays, is_static)

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
        moments = {n: self._moments(memory[n], g) for n, g in gradient.items()}
        return {name: _adam(own, self.decays) for name, own in moments.items()}, moments

    def keep_(
        self,
        memory: Mapping[str, dict[str, Any]],
        moments: Mapping[str, dict[str, Any]],
        finite: Finiteness,
    ) -> list[ParameterChange]:
        """Keep the state that follows from `directions`, since the step is taken.

        Args:
            memory: The optimizer's state, by parameter name.
            moments: The state that follows, by parameter name.
            finite: Whether all numbers are finite.

        Returns:
            Changes of tensors that stay where they are.
        """
        old: list[Tensor] = []
        new: list[Tensor] = []
        for name, state in moments.items():
            for key, value in state.items():
                if self.is_static and key in memory[name]:
                    old.append(memory[name][key])
                    new.append(value)
                else:
                    memory[name][key] = value
        if not old:
            return []
        return [
            ParameterChange.replacing(old, or_others(new, old, finite) if finite.is_late else new)
        ]

    def _moments(self, state: Mapping[str, Any], gradient: Tensor) -> dict[str, Any]:
        """Return the moving averages after one more gradient."""
        count = state.get(COUNT_KEY, 0) + 1
        new: dict[str, Any] = {COUNT_KEY: count_on(gradient.device, count, self.is_static)}
        gradient = gradient.to(precise(gradient.dtype))
        values = (gradient, _by_part(_square, gradient))
        for name, decay, value in zip(AVERAGES, self.decays, values):
            before = state[name] if name in state else torch.zeros_like(value)
            new[name] = before.lerp(value, 1 - decay)
        return new

    @property
    def has_momentum(self) -> bool:
        """Whether the directions average gradients, so that no other momentum is added."""
        return self.kind == "adam"


def count_on(device: torch.device, count: float | Tensor, is_static: bool) -> int | Tensor:
    """Return a count of steps as a number, or as ``torch.optim.Adam`` has it on a device.

    Args:
        device: The device.
        count: The count.
        is_static: Whether it is to be on the device.
    """
    if not is_static:
        return int(count)
    if isinstance(count, Tensor):
        return count.to(device, torch.float32)
    return torch.full((), float(count), dtype=torch.float32, device=device)


def _adam(moments: Mapping[str, Any], decays: tuple[float, float]) -> Tensor:
    """Return Adam's direction."""
    count, averages = moments[COUNT_KEY], [moments[name] for name in AVERAGES]
    corrections = [_correction(decay, count, averages[0].dtype) for decay in decays]
    mean, square = (own / correction for own, correction in zip(averages, corrections))
    return _by_part(_normalized, mean, square)


def _correction(decay: float, count: int | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return the sum of the weights in an average of a data type: ``1 - decay^count``."""
    if not isinstance(count, Tensor):
        return float(1 - decay**count)
    return (1 - decay ** count.double()).to(dtype.to_real())


def _square(gradient: Tensor) -> Tensor:
    """Return the squares of entries, finite ones: an average with infinity becomes NaN."""
    return gradient.square().clamp_max_(torch.finfo(gradient.dtype).max)


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
