"""State that travels among the states of parameters.

`torch.distributed.checkpoint.state_dict` keeps states of parameters and parameter groups, and drops
everything else. Everything is therefore also saved in the state of the first parameter, as a
tuple: `torch.distributed.checkpoint` looks into other containers, and would need tensors of the
same shapes where it loads them. It also repeats the states of parameters, so that an optimizer
that has none yet can load them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

CARRIED = "kfac"
"""Key of the tuple."""


def carry_(
    state: dict[str, Any],
    part: Mapping[str, Any],
    names: Sequence[str],
    whole: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Add nested containers to the state of the first parameter, which is replaced.

    Args:
        state: A state of an optimizer, as torch has it.
        part: The containers.
        names: Names of the parameters, in the order of the groups.
        whole: Returns states of parameters with whole tensors, by name.
    """
    numbers = numbers_of(state)
    if not numbers:
        return
    memory, named = state["state"], dict(zip(numbers, names))
    own = whole({named[number]: dict(values) for number, values in memory.items()})
    first = numbers[0]
    memory[first] = {**memory.get(first, {}), CARRIED: (dict(part), own)}
    for number in numbers:
        memory.setdefault(number, {})  # `set_optimizer_state_dict` looks for every parameter


def taken_out(state: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, Any]:
    """Return what `carry_` added, or ``None``, and the states of parameters.

    These are those that are saved, or where there is none for a parameter, what is carried of it.

    Args:
        state: A state of an optimizer, as torch has it, or something else.
        names: Names of the parameters, in the order of the groups.
    """
    memory = state.get("state")
    if not isinstance(memory, Mapping):
        return None, memory
    carried = next((own[CARRIED] for own in memory.values() if _carries(own)), None)
    known = {number: _without(own) for number, own in memory.items()}
    known = {number: own for number, own in known.items() if own != {}}
    if not isinstance(carried, (tuple, list)) or len(carried) != 2:
        return None, known
    part, others = carried
    if isinstance(others, Mapping):
        numbers = {name: number for number, name in zip(numbers_of(state), names)}
        saved = {numbers[name]: own for name, own in others.items() if name in numbers}
        known = {**saved, **known}
    return part, known


def numbers_of(state: Mapping[str, Any]) -> list[Any]:
    """Return the numbers of the parameters of a state, in the order of the groups."""
    groups = state.get("param_groups")
    if not isinstance(groups, (list, tuple)) or not all(isinstance(g, Mapping) for g in groups):
        return []
    members = [group.get("params") for group in groups]
    numbers = [n for own in members if isinstance(own, (list, tuple)) for n in own]
    return numbers if all(isinstance(number, (int, str)) for number in numbers) else []


def _carries(own: Any) -> bool:
    return isinstance(own, Mapping) and CARRIED in own


def _without(own: Any) -> Any:
    """Return the state of a parameter without what it carries."""
    if not _carries(own):
        return own
    return {name: value for name, value in own.items() if name != CARRIED}
