"""What a saved state of the running curvature must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einconv_kfac.curvature.arguments import shown
from einconv_kfac.optim.factors.running import RunningFactors
from einconv_kfac.optim.inverses.protocol import Kind
from einconv_kfac.optim.state_schema import COUNT, INTEGER, TEXT, Anything, Each, Record

CURVATURE_STATE_VERSION = 11
"""Version of saved states, of the optimizer and of the preconditioner."""
_SCHEMA = Record(
    {
        "version": COUNT,
        "layers": Anything(),
        "steps": COUNT,
        "seed": INTEGER,
        "inverse": TEXT,
    }
)


def check_curvature_state(state: Any, layers: Mapping[str, RunningFactors], kind: Kind) -> None:
    """Raise a ``ValueError`` if a state is none, or of another version, kind or model.

    Args:
        state: The state.
        layers: The layers it is for.
        kind: The kind of inverse it is for.
    """
    check_version(state)
    _SCHEMA.check("'preconditioner'", state)
    if (found := state["inverse"]) != kind.name:
        raise ValueError(
            f"`state_dict` must come from the same `inverse`, got {found!r} for {kind.name!r}. "
            f"Pass inverse={found!r}, or load the state of the model alone."
        )
    if state["layers"] is not None:
        _check_layers(layers, state["layers"], kind)


def check_version(state: Any) -> None:
    """Raise a ``ValueError`` if a state is none, or of another version."""
    version = state.get("version") if isinstance(state, Mapping) else None
    if not isinstance(version, int) or version != CURVATURE_STATE_VERSION:
        found = "a state without a version" if version is None else shown(version)
        raise ValueError(
            f"`state_dict` must be a KFAC state of version {CURVATURE_STATE_VERSION}, got "
            f"{found}. States of other versions cannot be loaded: load the state of the "
            "model alone, and begin with a new optimizer."
        )


def loaded_layers(
    layers: Mapping[str, RunningFactors], states: Mapping[str, Any] | None
) -> dict[str, RunningFactors]:
    """Return layers with checked states, or without any factors if there are none."""
    if states is None:
        return {name: own.anew() for name, own in layers.items()}
    return {name: own.loaded(states[name]) for name, own in layers.items()}


def _check_layers(layers: Mapping[str, RunningFactors], states: Any, kind: Kind) -> None:
    """Raise a ``ValueError`` if states belong to other layers.

    Args:
        layers: The layers.
        states: Their states.
        kind: The kind of inverse.
    """
    Each(Anything()).check("layers", states)
    if differ := layers.keys() ^ states.keys():
        raise ValueError(
            f"`state_dict` must have the model's layers, differs in {', '.join(sorted(differ))}. "
            "Pass the arguments that it was saved with (`params`, `exclude`), or save it with "
            "include_factors=False."
        )
    for name, running in layers.items():
        running.check_state(states[name], kind)
