"""What a saved state of the running curvature must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from einconv_kfac.optim.arguments import shown
from einconv_kfac.optim.factors.running import RunningFactors
from einconv_kfac.optim.inverses.protocol import Kind
from einconv_kfac.optim.state_schema import COUNT, TEXT, Anything, Each, Record

CURVATURE_STATE_VERSION = 7
"""Version of saved states, of the optimizer and of the preconditioner."""

CUDA_STATE_BYTES = 16
"""Bytes of the state of a CUDA generator: a seed and an offset, of 64 bits each."""

SEED_STRIDE = 1_000_003
"""How far apart the seeds are that are made of a seed and a number of steps."""

_SCHEMA = Record(
    {
        "version": COUNT,
        "layers": Anything(),
        "generator": Anything(),
        "steps": COUNT,
        "inverse": TEXT,
    }
)


def check_curvature_state(
    state: Any, layers: Mapping[str, RunningFactors], kind: Kind, generator: Generator
) -> None:
    """Raise a ``ValueError`` if a state is none, or of another version, kind or model.

    Args:
        state: The state.
        layers: The layers it is for.
        kind: The kind of inverse it is for.
        generator: The random generator it is for.
    """
    check_version(state)
    _SCHEMA.check("'preconditioner'", state)
    if state["inverse"] != kind.name:
        raise ValueError(
            f"`state_dict` must come from the same `inverse`, got {state['inverse']!r} for "
            f"{kind.name!r}."
        )
    if state["generator"] is not None:
        _check_generator(state["generator"], generator)
    if state["layers"] is not None:
        _check_layers(layers, state["layers"], kind)


def check_version(state: Any) -> None:
    """Raise a ``ValueError`` if a state is none, or of another version."""
    version = state.get("version") if isinstance(state, Mapping) else None
    if not isinstance(version, int) or version != CURVATURE_STATE_VERSION:
        found = "a state without a version" if version is None else shown(version)
        raise ValueError(
            f"`state_dict` must be a KFAC state of version {CURVATURE_STATE_VERSION}, got "
            f"{found}. States of earlier versions cannot be loaded: load the state of the "
            "model, and start with a new optimizer."
        )


def loaded_layers(
    layers: Mapping[str, RunningFactors], states: Mapping[str, Any] | None
) -> dict[str, RunningFactors]:
    """Return layers with checked states, or without any factors if there are none."""
    if states is None:
        return {name: own.anew() for name, own in layers.items()}
    return {name: own.loaded(states[name]) for name, own in layers.items()}


def snapshot_of(layers: dict[str, RunningFactors]) -> Callable[[], None]:
    """Return a function that restores layers, in the same dictionary."""
    saved = {name: (own, own.snapshot()) for name, own in layers.items()}

    def restore() -> None:
        layers.clear()
        for name, (own, snapshot) in saved.items():
            own.restore_(snapshot)
            layers[name] = own

    return restore


def _check_layers(layers: Mapping[str, RunningFactors], states: Any, kind: Kind) -> None:
    """Raise a ``ValueError`` if states belong to other layers.

    Args:
        layers: The layers.
        states: Their states.
        kind: The kind of inverse.
    """
    Each(Anything()).check("layers", states)
    if differ := layers.keys() ^ states.keys():
        raise ValueError(f"`state_dict` must have the model's layers, differs in {differ}.")
    for name, running in layers.items():
        running.check_state(states[name], kind)


def _check_generator(state: Any, generator: Generator) -> None:
    """Raise a ``ValueError`` if a state is neither of this generator nor of another device's.

    Args:
        state: The state.
        generator: The generator.
    """
    if is_of_another_device(state, generator):
        return
    if _is_bytes(state) and state.shape == generator.get_state().shape:
        try:
            Generator(generator.device).set_state(state.cpu())
            return
        except RuntimeError:  # the numbers are no state
            pass
    raise ValueError(
        f"`state_dict` must have the state of a random generator on {generator.device} at "
        f"'preconditioner'.generator, got {shown(state)}. To start with a new one, set it to None."
    )


def is_of_another_device(state: Any, generator: Generator) -> bool:
    """Return whether a state has the size of one that a generator of another device has.

    Such a state cannot go on here: the same numbers are not drawn on both devices.
    """
    own = len(generator.get_state())
    known = {CUDA_STATE_BYTES, len(Generator().get_state())}
    return _is_bytes(state) and state.ndim == 1 and len(state) in known - {own}


def _is_bytes(state: Any) -> bool:
    """Return whether a state is a tensor of bytes with values."""
    return isinstance(state, Tensor) and state.dtype == torch.uint8 and not state.is_meta


def restore_generator_(generator: Generator, state: Tensor | None, seed: int, steps: int) -> None:
    """Have a generator go on from a checked state, or from anew.

    Args:
        generator: The generator.
        state: Its state, that of a generator of another device, or None.
        seed: The seed of a generator that starts anew.
        steps: The number of steps taken, which then is part of the seed, if the state is another
            device's: the targets of the first steps are not drawn a second time.
    """
    if state is None:
        generator.manual_seed(seed)
    elif is_of_another_device(state, generator):
        generator.manual_seed((seed * SEED_STRIDE + steps) % (1 << 63))
    else:
        generator.set_state(state.cpu())
