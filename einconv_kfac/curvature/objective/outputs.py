"""The tensors that a model returns, and the losses among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output: in tuples, lists, mappings and attributes of objects.

    The attributes of modules and classes, and those of other objects inside of these, do not count.
    """
    yield from _tensors_of(output, is_whole=True)


def _tensors_of(output: Any, *, is_whole: bool) -> Iterator[Tensor]:
    """Yield the tensors of an output or of a part of it."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors_of(part, is_whole=is_whole)
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors_of(part, is_whole=is_whole)
    elif is_dataclass(output) and not isinstance(output, type):
        for entry in fields(output):
            yield from _tensors_of(getattr(output, entry.name), is_whole=is_whole)
    elif is_whole and not isinstance(output, (type, nn.Module)):
        for part in getattr(output, "__dict__", {}).values():
            yield from _tensors_of(part, is_whole=False)


def losses_of(output: Any) -> list[Tensor]:
    """Return the losses that a model returns.

    That is the entry or the attribute ``loss`` of the output, or the output or the first entry of
    a tuple if it is one number; a mapping whose entries are all such numbers returns several.
    """
    if isinstance(output, Mapping):
        if "loss" in output:
            return [output["loss"]] if _is_loss(output["loss"]) else []
        parts = list(output.values())
        return parts if parts and all(_is_loss(part) for part in parts) else []
    if isinstance(output, (tuple, list)):
        return [output[0]] if output and _is_loss(output[0]) else []
    loss: Any = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    return [loss] if _is_loss(loss) else []


def _is_loss(value: Any) -> bool:
    """Return whether a value is one number that can be differentiated."""
    return isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad


def numbers_of(output: Any) -> list[Tensor]:
    """Return what may be losses in an output: `losses_of`, and all other tensors ``[]``.

    They are results of operations that can be differentiated, each of them once.
    """
    others = (t for t in tensors_of(output) if t.ndim == 0 and t.grad_fn is not None)
    return [*{id(tensor): tensor for tensor in (*losses_of(output), *others)}.values()]
