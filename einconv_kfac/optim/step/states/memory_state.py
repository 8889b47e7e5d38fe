"""What torch's part of a saved state must be: parameter groups, and a state per parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from einconv_kfac.curvature.arguments import shown
from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.state_schema import (
    COUNT,
    Leaf,
    Record,
    Schema,
    is_dense_tensor,
    squares_of,
    tensor_of,
)
from einconv_kfac.optim.step.fallback import AVERAGES, COUNT_KEY, count_on
from einconv_kfac.optim.step.momentum.slow_momentum import BUFFER
from einconv_kfac.optim.step.rollback import MOMENTUM_BUFFER
from einconv_kfac.optim.vectors import precise

Groups = Sequence[Mapping[str, Any]]


def check_groups(groups: Groups, state: Mapping[str, Any], settings: Hyperparameters) -> None:
    """Raise a ``ValueError`` if saved parameter groups do not fit an optimizer's.

    Args:
        groups: The optimizer's groups.
        state: The saved state.
        settings: The optimizer's hyper-parameters, which groups override.
    """
    if missing := [name for name in ("state", "param_groups") if name not in state]:
        raise ValueError(
            f"`state_dict` must have the entries state and param_groups, lacks {missing}."
        )
    saved = state["param_groups"]
    if not isinstance(saved, (list, tuple)) or not all(isinstance(own, Mapping) for own in saved):
        raise ValueError(f"`state_dict` must have a list of param_groups, got {shown(saved)}.")
    if len(saved) != len(groups):
        raise ValueError(
            f"`state_dict` must have {len(groups)} param_groups, got {len(saved)}: the optimizers "
            "have a different number of parameter groups."
        )
    for index, (own, group) in enumerate(zip(saved, groups)):
        members, expected = own.get("params"), len(group["params"])
        if not isinstance(members, (list, tuple)) or len(members) != expected:
            raise ValueError(
                f"`state_dict` must have {expected} params in param_groups.{index}, got a group "
                f"that doesn't match the size of optimizer's group: {shown(members)}."
            )
        lost = settings.group_defaults().keys() - own.keys()
        if lost:
            raise ValueError(f"`state_dict` must have {sorted(lost)} in param_groups.{index}.")
        settings.with_overrides(own)


def check_memory(
    groups: Groups, state: Mapping[str, Any], names: Mapping[nn.Parameter, str]
) -> None:
    """Raise a ``ValueError`` if saved states of parameters are not those of an optimizer's.

    Args:
        groups: The optimizer's groups.
        state: The saved state.
        names: Names of the parameters.
    """
    saved = state["state"]
    if not isinstance(saved, Mapping):
        raise ValueError(f"`state_dict` must have a dictionary at state, got {shown(saved)}.")
    known = dict(_pairs(groups, state["param_groups"]))
    if differ := [key for key in saved if key not in known]:
        raise ValueError(
            f"`state_dict` must have states of the params in its param_groups, got one of {differ}."
        )
    for key, own in saved.items():
        _schema(known[key]).check(f"state of '{names[known[key]]}'", own)


def own_memory_(optimizer: Optimizer, state: Mapping[str, Any], *, is_static: bool) -> None:
    """Give the states of parameters, which torch has loaded, the form and the memory of a mode.

    ``torch.optim.Optimizer.load_state_dict`` rounds them to the parameters' data type, and shares
    memory with the saved state, which another optimizer may change in place. They are kept in
    float32 at least, and a count of steps as a number, or as a tensor on the device.

    Args:
        optimizer: The optimizer, which has loaded the state.
        state: The saved state.
        is_static: Whether the device counts the steps.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters):
        device, dtype = parameter.device, precise(parameter.dtype)
        for key, value in state["state"].get(number, {}).items():
            own = optimizer.state[parameter]
            if key == COUNT_KEY:
                count = value.clone() if isinstance(value, Tensor) else value
                own[key] = count_on(device, count, is_static)
            elif isinstance(value, Tensor):
                own[key] = value.to(device, dtype, copy=True)


def _pairs(groups: Groups, saved: Groups) -> Iterator[tuple[Any, nn.Parameter]]:
    """Yield the saved key of each parameter, and the parameter.

    Raises:
        ValueError: If a key cannot be one, or is there twice.
    """
    seen: set[Any] = set()
    for group, own in zip(groups, saved):
        for parameter, key in zip(group["params"], own["params"]):
            if not isinstance(key, (int, str)) or key in seen:
                raise ValueError(f"`state_dict` must have params that differ, got {shown(key)}.")
            seen.add(key)
            yield key, parameter


def _schema(parameter: Tensor) -> Record:
    """Return what the state of a parameter must be."""
    shape, is_complex = parameter.shape, parameter.is_complex()
    mean, square = AVERAGES
    entries: dict[str, Schema] = {
        **dict.fromkeys((MOMENTUM_BUFFER, BUFFER, mean), tensor_of(shape, is_complex=is_complex)),
        square: squares_of(shape, is_complex=is_complex),
        COUNT_KEY: _STEPS,
    }
    return Record(entries, optional=True)


def _is_count(value: Any) -> bool:
    """Return whether a value is a count of steps, as a number or as a tensor."""
    if not isinstance(value, Tensor):
        return COUNT.holds(value)
    if value.shape or not is_dense_tensor(value) or value.is_complex():
        return False
    number = float(value)
    return number >= 0 and number.is_integer()


_STEPS = Leaf("an integer that is not negative, or a floating-point tensor of one,", _is_count)
