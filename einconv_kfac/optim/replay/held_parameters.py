"""Parameters that a module also keeps in a list, a mapping or a plain attribute of its own.

A cell may read its weights from a mapping that it filled in ``__init__``. A replay with other
values of the parameters has to put these there as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.objective.graph import leaf_of, reached_nodes
from einconv_kfac.optim.replay.jvp import normal

_MODULES_OWN = frozenset(vars(nn.Module()))
"""The attributes that every module has."""
_MAPPINGS = (dict, OrderedDict)
_SEQUENCES = (list, tuple)
FEW_ENTRIES = 4096
"""Number of entries up to which lists and mappings are searched."""


@dataclass(frozen=True)
class HeldParameters:
    """What takes the place of attributes of a module that are, or contain, parameters.

    Args:
        module: The module.
        values: The attributes by name, with other values of the parameters.
    """

    module: nn.Module
    values: Mapping[str, Any]


def held_parameters(
    modules: Iterable[nn.Module], values_of: Mapping[Tensor, Tensor]
) -> list[HeldParameters]:
    """Return the attributes that take other values.

    Args:
        modules: The modules.
        values_of: The values of parameters.
    """
    found = []
    for module in modules if values_of else ():
        own = {
            name: replaced
            for name, value in vars(module).items()
            if name not in _MODULES_OWN and (replaced := _replaced(value, values_of)) is not value
        }
        if own:
            found.append(HeldParameters(module, own))
    return found


def _replaced(value: Any, values_of: Mapping[Tensor, Tensor]) -> Any:
    """Return a value with other values of parameters, itself if it has none of them."""
    if isinstance(value, nn.Parameter):
        return values_of.get(value, value)
    kind = type(value)
    if kind in _MAPPINGS and len(value) <= FEW_ENTRIES:
        pairs = [(key, own, _replaced(own, values_of)) for key, own in value.items()]
        is_same = all(own is new for _, own, new in pairs)
        return value if is_same else kind((key, new) for key, _, new in pairs)
    if kind in _SEQUENCES and len(value) <= FEW_ENTRIES:
        entries = [_replaced(own, values_of) for own in value]
        return value if all(a is b for a, b in zip(value, entries)) else kind(entries)
    return value


@contextmanager
def held_values(held: Sequence[HeldParameters]) -> Iterator[None]:
    """Give attributes other values inside the block."""
    kept = [(each.module, {name: vars(each.module)[name] for name in each.values}) for each in held]
    for each in held:
        vars(each.module).update(each.values)
    try:
        yield
    finally:
        for module, values in kept:
            vars(module).update(values)


def check_replaced(outputs: Sequence[Tensor], names: Mapping[Tensor, str]) -> None:
    """Check that outputs of a replay do not depend on parameters that took other values.

    Args:
        outputs: The outputs, with their graph.
        names: These parameters with their names.

    Raises:
        RuntimeError: If they do.
    """
    if found := _reached(outputs, names):
        raise RuntimeError(
            "The model must use its parameters as attributes of its modules when adaptive=True, "
            f"got '{found}', which it also reaches in another way, as by a closure or by a "
            "tensor that was computed before the call. Compute that tensor in `forward` from the "
            "attribute of the module, or pass adaptive=False."
        )


def _reached(outputs: Sequence[Tensor], names: Mapping[Tensor, str]) -> str:
    """Return the name of a parameter by which outputs have a derivative, or an empty one.

    What stands between two calls is differentiated along the recorded graph, and thus leads to
    parameters, by which its derivative is zero.
    """
    leaves = (leaf_of((node, 0)) for node in reached_nodes(outputs))
    found = [leaf for leaf in leaves if leaf is not None and leaf in names]
    if not found:
        return ""
    curved = [output for output in outputs if output.requires_grad]
    try:
        own = torch.autograd.grad(curved, found, [normal(o) for o in curved], allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # the graph between two calls is gone
        return ""
    return min(
        (
            names[p]
            for p, g in zip(found, own)
            if g is not None and bool(g.nan_to_num(0, 0, 0).any())
        ),
        default="",
    )
