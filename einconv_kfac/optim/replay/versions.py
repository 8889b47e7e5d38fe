"""Tensors that must not change between a forward pass and the step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from einconv_kfac.distributed.stored import all_stored, is_divided, local_of

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers with a number of bytes."""
MULTIPLIER = 0x1E3779B97F4A7C15
"""A number whose multiples modulo 2^64 look random."""

State: TypeAlias = tuple[tuple[object, ...], ...]
"""Version and address of each of several tensors."""


class _Rows:
    """The rows that a worker stores of a parameter, whose version does not tell of changes.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: Tensor) -> None:
        self._digest = digest(rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rows) and torch.equal(self._digest, other._digest)

    __hash__ = None  # type: ignore[assignment]


class Versions:
    """The versions of tensors, by which operations in place are found.

    Args:
        named: Tensors with what they are.
        copies: The identities of those that were copied before the call that they are passed to,
            so that they may change after it.

    Attributes:
        during_call: What the call changed that the tensors were passed to; see `end_call_`.
    """

    def __init__(self, named: Iterable[tuple[str, object]], copies: Collection[int] = ()) -> None:
        self.during_call: str | None = None
        self._copies = copies
        self._known = [
            (name, tensor, tensor._version)
            for name, tensor in named
            if isinstance(tensor, Tensor) and not tensor.is_inference()
        ]

    @staticmethod
    def of_call(
        args: Sequence[Any], kwargs: dict[str, Any], kept: Sequence[Any], named: dict[str, Any]
    ) -> Versions:
        """Return the versions of the arguments of a call of the model.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.
            kept: The positional arguments, or copies of them.
            named: The keyword arguments, or copies of them.
        """
        pairs = zip((*args, *kwargs.values()), (*kept, *named.values()))
        copies = {id(given) for given, own in pairs if own is not given}
        return Versions(arguments_of(args, kwargs), copies)

    @staticmethod
    def known(tensors: Iterable[tuple[str, Tensor, int]]) -> Versions:
        """Return tensors with the versions that they had."""
        found = Versions(())
        found._known = list(tensors)
        return found

    def end_call_(self) -> None:
        """Note what was changed so far, by the call that the tensors were passed to."""
        self.during_call = self.changed()
        self._known = [each for each in self._known if id(each[1]) not in self._copies]

    def changed(self) -> str | None:
        """Return what was changed in place, or ``None``."""
        if self.during_call is not None:
            return self.during_call
        return next((n for n, tensor, version in self._known if tensor._version != version), None)


def digest(tensor: Tensor) -> Tensor:
    """Return a number that depends on each bit of a tensor and on the order of its entries.

    It is the sum of the entries' bits times odd numbers, modulo 2^64, so that a change of one
    entry always changes it, and a change of several all but surely.
    """
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = parts.contiguous().view(INTEGERS[parts.element_size()]).flatten().long()
    odd = torch.arange(bits.numel(), device=bits.device) * MULTIPLIER | 1
    return (bits * odd).sum()


def version_of(tensor: Tensor) -> int:
    """Return the version of a tensor; torch lets nobody change one made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def state_of(parameters: Iterable[nn.Parameter]) -> State:
    """Return the state of parameters, which differs after every change of a value.

    Raises:
        RuntimeError: If one that is trained was made in inference mode.
    """
    found = list(all_stored(parameters))
    if any(p.requires_grad and p.is_inference() for p in found):
        raise RuntimeError(
            "Parameters that are trained must be made outside of `torch.inference_mode()`, where "
            "torch keeps no gradients, got a model that was made or copied inside of it. Make or "
            "copy it outside, and `load_state_dict` the states of model and optimizer."
        )
    return tuple(
        (version_of(p), _Rows(local_of(p)) if is_divided(p) else p.data_ptr()) for p in found
    )


def arguments_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield the arguments of the model with their names."""
    for index, value in enumerate(args):
        yield f"argument {index} of the model", value
    for name, value in kwargs.items():
        yield f"argument `{name}` of the model", value
