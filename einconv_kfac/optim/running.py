"""One layer's running Kronecker factors and their damped inverses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.damping import damped_inverses
from einconv_kfac.curvature.layers import Layer

Pair = tuple[Tensor, Tensor]
_STATE = ("updates", "factors", "inverses", "factor_step", "inverse_step")


class RunningFactors:
    """Applies ``(B (x) A + damping I)^-1`` to a layer's gradient, with factored damping.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.updates = 0
        self.factors: Pair | None = None
        self.inverses: Pair | None = None
        self.factor_step: int | None = None
        self.inverse_step: int | None = None

    def update_(self, a: Tensor, b: Tensor, decay: float) -> None:
        """Move the bias-corrected running averages towards new factors."""
        self.updates += 1
        if self.factors is None:
            self.factors = (a, b)
            return
        weight = (1 - decay) / (1 - decay**self.updates)
        self.factors = (self.factors[0].to(a), self.factors[1].to(b))
        for running, new in zip(self.factors, (a, b)):
            running.lerp_(new, weight)

    def inverted(self, damping: float) -> Pair | None:
        """Return the damped inverses of the factors there are.

        Raises:
            RuntimeError: If a damped factor is not positive definite.
        """
        if self.factors is None:
            return None
        return damped_inverses(self.factors, damping, f"'{self.layer.name}'")

    def change(self, update: dict[str, Tensor], parameters: dict[str, Tensor]) -> Tensor:
        """Return ``sqrt(tr(U A U^T) / tr(W A W^T))`` for an update ``U`` of parameters ``W``."""
        assert self.factors is not None
        a, _ = self.factors
        squares = []
        for values in (update, parameters):
            known = {name: values[name] for name in self.layer.parameters if name in values}
            rows = self.layer.to_matrix({**self.layer.zeros(), **known}).to(a.dtype)
            squares.append(((rows @ a) * rows).sum())
        change: Tensor = (squares[0] / squares[1].clamp_min(torch.finfo(a.dtype).tiny)).sqrt()
        return change

    def apply(self, gradient: dict[str, Tensor], inverses: Pair) -> dict[str, Tensor]:
        """Return the preconditioned gradient of the layer's parameters."""
        if not gradient.keys() >= set(self.layer.parameters):
            gradient = {**self.layer.zeros(), **gradient}
        rows = self.layer.to_matrix(gradient)
        a, b = (inverse.to(rows.device) for inverse in inverses)
        result = self.layer.from_matrix(b @ rows.to(a.dtype) @ a)
        return {name: tensor.to(rows.dtype) for name, tensor in result.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and numbers."""
        return {name: getattr(self, name) for name in _STATE}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ``ValueError`` if a state belongs to a layer of another shape."""
        if state["factors"] is None:
            return
        matrix = self.layer.to_matrix(self.layer.zeros())
        groups, rows, columns = matrix.shape
        expected = [(groups, columns, columns), (groups, rows, rows)]
        found = [tuple(factor.shape) for factor in state["factors"]]
        if found != expected:
            raise ValueError(
                f"`state_dict` must have factors of shape {expected} for '{self.layer.name}', "
                f"got {found}."
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; tensors are copied to the layer's device."""
        device = next(self.layer.module.parameters()).device

        def copied(pair: Pair | None) -> Pair | None:
            return pair and (pair[0].to(device, copy=True), pair[1].to(device, copy=True))

        for name in _STATE:
            setattr(self, name, state[name])
        self.factors, self.inverses = copied(state["factors"]), copied(state["inverses"])
