"""One layer's running Kronecker factors and the inverse that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.cholesky import UNKNOWN_RANKS, Bounds, Pair
from einconv_kfac.curvature.blocks.low_rank import RankBound
from einconv_kfac.curvature.estimation.fisher import FisherEstimator
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.optim.definiteness import FACTOR
from einconv_kfac.optim.factors.visible_factors import visible_factors
from einconv_kfac.optim.inverses.background import Pending
from einconv_kfac.optim.inverses.protocol import Inverted, Kind, LayerInverse, Task
from einconv_kfac.optim.inverses.registry import (
    check_inverse,
    inverse_of,
    with_own_tensors,
)
from einconv_kfac.optim.state_schema import (
    COUNT,
    POSITIVE,
    Anything,
    Leaf,
    Listed,
    Maybe,
    Record,
    is_dense_tensor,
)

_CONDITIONS = Leaf(
    "two condition numbers",
    lambda v: is_dense_tensor(v) and tuple(v.shape) == (2,) and bool((v >= 0).all()),
)
_SCHEMA = Record(
    {
        "updates": COUNT,
        "rows": COUNT,
        "factors": Maybe(Listed(FACTOR, 2)),
        "factor_step": Maybe(COUNT),
        "inverse_step": Maybe(COUNT),
        "retries": COUNT,
        "stretch": POSITIVE,
        "conditions": Maybe(_CONDITIONS),
        "inverse": Anything(),
        "pending": Maybe(
            Record(
                {
                    "begun": COUNT,
                    "due": COUNT,
                    "inverse": Anything(),
                    "conditions": _CONDITIONS,
                    "retries": COUNT,
                }
            )
        ),
    }
)
"""What the state of a layer must be, but for the shapes of factors and for inverses."""
_STATE = (
    *("updates", "rows", "factors", "factor_step"),
    *("inverse_step", "retries", "stretch", "conditions"),
)


class RunningFactors:
    """Running factors of a layer, and their damped inverse.

    Args:
        layer: The layer.
        estimator: Which Fisher its factors are of.

    Attributes:
        shapes: The shapes of its factors ``A`` and ``B``; one that is diagonal is ``[g, d]``.
        is_owned: Whether this worker has the factors; every worker has the inverse.
        rows: Number of products of the weight with a vector in the forward passes of a step.
        stretch: Mean square of the change of the weight by a step of its parameters of length 1,
            when the factors were last updated; 1 if the weight is a parameter. The damping of the
            parameters is that of the weight times it.
    """

    def __init__(self, layer: Layer, estimator: FisherEstimator) -> None:
        self.layer = layer
        self.shapes = [tuple(shape) for shape in estimator.shapes(layer)]
        sampled = estimator.fisher in {"mc", "empirical"}
        self._gradients = estimator.mc_samples if sampled else None  # of a row, if it is known
        self._bounded: tuple[int, Bounds] | None = None
        self.updates = self.rows = 0
        self.is_owned = True
        self.factors: Pair | None = None
        self._is_elsewhere = False  # another worker has the factors
        self.factor_step: int | None = None
        self.inverse: LayerInverse | None = None
        self.inverse_step: int | None = None
        self.pending: Pending | None = None
        self.retries, self.stretch = 0, 1.0
        self.conditions: Tensor | None = None
        self.factor_seconds = 0.0
        self.inverse_seconds = 0.0

    def correct_(self, squares: Tensor, decay: float) -> None:
        """Move the inverse towards squared gradients ``[g, co, d]`` in its basis."""
        assert self.inverse is not None
        self.inverse = self.inverse.with_squared_gradients(squares, decay)

    @property
    def has_factors(self) -> bool:
        """Whether there are factors, on this worker or on another."""
        return self.factors is not None or self._is_elsewhere

    @property
    def work(self) -> int:
        """See `Task`; it follows from shapes."""
        return self._task(self._shaped(), 0.0).work

    def updated_elsewhere_(self) -> None:
        """Count an update of the factors on another worker."""
        self.updates += 1
        self._is_elsewhere = True

    def task(self, damping: float) -> Task | None:
        """Return what is to be inverted, if there are factors; elsewhere, they are shapes alone."""
        if not self.has_factors:
            return None
        return self._task(self._shaped() if self.factors is None else self.factors, damping)

    def _task(self, factors: Pair, damping: float) -> Task:
        visible, layer = visible_factors(self.layer, factors), self.layer
        if visible is not None:
            return Task(layer.name, visible, damping, layer.layout)
        return Task(layer.name, factors, damping, layer.layout, self._bounds())

    def _bounds(self) -> Bounds:
        """Return bounds on the ranks of the factors: the rows that they were updated with.

        Rows are those of the last update. Where earlier ones had more, `low_rank` finds a larger
        rank, and the factor is inverted as any other.
        """
        if self.factors is None or not self.rows:
            return UNKNOWN_RANKS
        if self._bounded is None or self._bounded[0] != self.updates:
            rows = self.rows * self.updates
            gradients = self._gradients and self._gradients * rows
            self._bounded = self.updates, (RankBound(rows), RankBound(gradients))
        return self._bounded[1]

    def _shaped(self) -> Pair:
        """Return tensors without numbers that have the shapes of the factors."""
        a, b = (torch.empty(shape, device="meta") for shape in self.shapes)
        return a, b

    def use_(self, inverted: Inverted, step: int) -> None:
        """Take over an inverse of a step's factors."""
        self.inverse = with_own_tensors(inverted.inverse, self.layer.layout)
        self.conditions = inverted.conditions
        self.retries += inverted.retries
        self.inverse_seconds = inverted.seconds
        self.inverse_step, self.pending = step, None

    def on_device(self, inverse: LayerInverse, device: torch.device) -> LayerInverse:
        """Return an inverse of the layer on the device of its gradients, which may have changed."""
        moved = inverse.to(device)
        if inverse is self.inverse:
            self.inverse = moved
        return moved

    def restore_(self, snapshot: dict[str, Any]) -> None:
        """Take back what happened since `snapshot_of`; an inverse that failed is due again."""
        vars(self).update(snapshot)
        if self.pending is not None and self.pending.found.has_failed:
            self.pending = None

    def state_dict(self, factors: Pair | None = None) -> dict[str, Any]:
        """Return the state as tensors and numbers, once a pending inverse is there.

        Args:
            factors: The factors, where another worker has them.
        """
        return {
            **{name: getattr(self, name) for name in _STATE},
            "factors": self.factors or factors,
            "inverse": self.inverse and self.inverse.state_dict(),
            "pending": self._pending_state(),
        }

    def _pending_state(self) -> dict[str, Any] | None:
        """Return the state of an inverse to come; none if it failed, for then it is due again."""
        pending = self.pending
        if pending is None or pending.found.error() is not None:  # waits for the thread
            return None
        found = pending.found.of(self.layer.name)
        return {
            "begun": pending.begun,
            "due": pending.due,
            "inverse": found.inverse.state_dict(),
            "conditions": found.conditions,
            "retries": found.retries,
        }

    def check_state(self, state: dict[str, Any], kind: Kind) -> None:
        """Raise a ``ValueError`` if a state is not one of this layer.

        Args:
            state: The state.
            kind: The kind of inverse.
        """
        layout, name = self.layer.layout, f"'{self.layer.name}'"
        _SCHEMA.check(name, state)
        found = [tuple(factor.shape) for factor in state["factors"] or ()]
        if found and found != self.shapes:
            raise ValueError(
                f"`state_dict` must have factors of shape {self.shapes} for {name}, got {found}: "
                "it must come from the same model, `approximation` and `max_factor_size`."
            )
        if state["inverse"] is not None:
            check_inverse(f"{name}.inverse", state["inverse"], kind, layout, found)
        if state["pending"] is not None:
            own = state["pending"]["inverse"]
            check_inverse(f"{name}.pending.inverse", own, kind, layout, found)

    def anew(self) -> RunningFactors:
        """Return the layer without factors."""
        made = copy(self)
        made.updates = made.retries = made.rows = 0
        made.factors = made.factor_step = made.conditions = None
        made._is_elsewhere, made._bounded = False, None
        made.inverse = made.inverse_step = made.pending = None
        return made

    def loaded(self, state: dict[str, Any]) -> RunningFactors:
        """Return the layer with a checked state; tensors are copied to the layer's device."""
        device = next(self.layer.module.parameters()).device
        made = self.anew()
        for name in _STATE:
            setattr(made, name, state[name])
        if not self.is_owned:
            made.factors, made._is_elsewhere = None, state["factors"] is not None
        elif state["factors"] is not None:
            a, b = (factor.to(device, copy=True) for factor in state["factors"])
            made.factors = a, b
        layout, inverse, pending = self.layer.layout, state["inverse"], state["pending"]
        made.inverse = inverse and inverse_of(inverse, layout, device)
        if pending:
            known = inverse_of(pending["inverse"], layout, device)
            found = Inverted(known, pending["conditions"], pending["retries"])
            times = pending["begun"], pending["due"]
            made.pending = Pending.of(*times, self.layer.name, found)
        return made


def snapshot_of(layers: dict[str, RunningFactors]) -> Callable[[], None]:
    """Return a function that restores layers, in the same dictionary."""
    saved = {name: (own, dict(vars(own))) for name, own in layers.items()}

    def restore() -> None:
        layers.clear()
        for name, (own, snapshot) in saved.items():
            own.restore_(snapshot)
            layers[name] = own

    return restore


def names_with_factors(layers: Mapping[str, RunningFactors]) -> list[str]:
    """Return the names of layers that have factors, on this worker or on another."""
    return [n for n, own in layers.items() if own.factors is not None or own._is_elsewhere]
