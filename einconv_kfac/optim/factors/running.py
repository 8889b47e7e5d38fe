"""One layer's running Kronecker factors and the inverse that is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.cholesky import Pair
from einconv_kfac.curvature.blocks.diagonal_factor import times_on_right
from einconv_kfac.curvature.devices.products import product
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.optim.inverses.background import Pending
from einconv_kfac.optim.inverses.protocol import Inverted, LayerInverse, Task
from einconv_kfac.optim.inverses.registry import inverse_of
from einconv_kfac.optim.moving_average import bias_corrected_weight
from einconv_kfac.optim.vectors import precise

_STATE = ("updates", "factors", "factor_step", "inverse_step", "retries", "conditions")


class RunningFactors:
    """Running factors of a layer, and their damped inverse.

    Args:
        layer: The layer.
        shapes: The shapes of its factors ``A`` and ``B``; one that is diagonal is ``[g, d]``.
    """

    def __init__(self, layer: Layer, shapes: Sequence[tuple[int, ...]]) -> None:
        self.layer = layer
        self._shapes = [tuple(shape) for shape in shapes]
        self.updates = 0
        self.factors: Pair | None = None
        self.factor_step: int | None = None
        self.inverse: LayerInverse | None = None
        self.inverse_step: int | None = None
        self.pending: Pending | None = None
        self.retries = 0
        self.conditions: Tensor | None = None
        self.factor_seconds = 0.0
        self.inverse_seconds = 0.0

    def update_(self, a: Tensor, b: Tensor, decay: float) -> None:
        """Move the bias-corrected running averages towards new factors."""
        self.updates += 1
        if self.factors is None:
            self.factors = (a, b)
            return
        weight = bias_corrected_weight(decay, self.updates)
        self.factors = (self.factors[0].to(a), self.factors[1].to(b))
        for running, new in zip(self.factors, (a, b)):
            running.lerp_(new, weight)

    def correct_(self, squares: Tensor, decay: float) -> None:
        """Move the inverse towards squared gradients ``[g, co, d]`` in its basis."""
        assert self.inverse is not None
        self.inverse = self.inverse.with_squared_gradients(squares, decay)

    def task(self, damping: float) -> Task | None:
        """Return what is to be inverted, if there are factors."""
        if self.factors is None:
            return None
        return Task(self.layer.name, self.factors, damping, self.layer.layout)

    def use_(self, inverted: Inverted, step: int) -> None:
        """Take over an inverse of a step's factors."""
        self.inverse, self.conditions = inverted.inverse, inverted.conditions
        self.retries += inverted.retries
        self.inverse_seconds = inverted.seconds
        self.inverse_step, self.pending = step, None

    def change(self, update: dict[str, Tensor], parameters: dict[str, Tensor]) -> Tensor:
        """Return ``sqrt(tr(U A U^T) / tr(W A W^T))`` for an update ``U`` of parameters ``W``.

        It is zero where the layer's output is: nothing is small relative to that, and a layer
        that starts at zero, as heads and residual branches often do, could never leave it.
        """
        assert self.factors is not None
        a, _ = self.factors
        squares = []
        for values in (update, parameters):
            known = {name: values[name] for name in self.layer.parameters if name in values}
            rows = self.layer.to_matrix({**self.layer.zeros(), **known}).to(a.dtype)
            squares.append((times_on_right(rows, a, product) * rows).sum())
        moved, present = squares
        return torch.where(present > 0, moved / present, 0.0).sqrt()

    def apply(self, gradient: dict[str, Tensor], inverse: LayerInverse) -> dict[str, Tensor]:
        """Return the preconditioned gradient of the layer's parameters, at least in float32."""
        if not gradient.keys() >= set(self.layer.parameters):
            gradient = {**self.layer.zeros(), **gradient}
        layout = self.layer.layout
        rows = layout.to_matrix(gradient)
        result = layout.from_matrix(self._here(inverse, rows).apply(rows))
        return {name: tensor.to(precise(rows.dtype)) for name, tensor in result.items()}

    def _here(self, inverse: LayerInverse, rows: Tensor) -> LayerInverse:
        """Return an inverse on the device of gradients, which may have changed."""
        moved = inverse.to(rows.device)
        if inverse is self.inverse:
            self.inverse = moved
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and numbers, once a pending inverse is there."""
        return {
            **{name: getattr(self, name) for name in _STATE},
            "inverse": self.inverse and self.inverse.state_dict(),
            "pending": self._pending_state(),
        }

    def _pending_state(self) -> dict[str, Any] | None:
        """Return the state of an inverse to come; none if it failed, for then it is due again."""
        pending = self.pending
        if pending is None or pending.found.exception() is not None:
            return None
        found = pending.found.result()[self.layer.name]
        return {
            "begun": pending.begun,
            "due": pending.due,
            "inverse": found.inverse.state_dict(),
            "conditions": found.conditions,
            "retries": found.retries,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ``ValueError`` if a state belongs to a layer of another shape."""
        if state["factors"] is None:
            return
        found = [tuple(factor.shape) for factor in state["factors"]]
        if found != self._shapes:
            raise ValueError(
                f"`state_dict` must have factors of shape {self._shapes} for '{self.layer.name}', "
                f"got {found}: it must come from the same model, `approximation` and "
                "`max_factor_size`."
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; tensors are copied to the layer's device."""
        device = next(self.layer.module.parameters()).device
        for name in _STATE:
            setattr(self, name, state[name])
        a, b = state["factors"] or (None, None)
        if a is not None and b is not None:
            self.factors = a.to(device, copy=True), b.to(device, copy=True)
        layout, inverse, pending = self.layer.layout, state["inverse"], state["pending"]
        self.inverse = inverse and inverse_of(inverse, layout, device)
        self.pending = None
        if pending:
            known = inverse_of(pending["inverse"], layout, device)
            found = Inverted(known, pending["conditions"], pending["retries"])
            times = pending["begun"], pending["due"]
            self.pending = Pending.of(*times, self.layer.name, found)


def check_layers(layers: Mapping[str, RunningFactors], states: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` if states belong to other layers."""
    if differ := layers.keys() ^ states.keys():
        raise ValueError(f"`state_dict` must have the model's layers, differs in {differ}.")
    for name, running in layers.items():
        running.check_state(states[name])
