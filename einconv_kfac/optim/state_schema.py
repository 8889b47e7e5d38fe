"""Schemas of saved states: what an entry must be, checked before anything is taken over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isnan
from typing import Any, Protocol

import torch
from torch import Tensor

from einconv_kfac.curvature.arguments import shown


class Schema(Protocol):
    """What a part of a state must be."""

    def check(self, path: str, value: Any) -> None:
        """Raise a ``ValueError`` if a value is something else.

        Args:
            path: Where the value is in the state, for the error.
            value: The value.
        """


@dataclass(frozen=True)
class Leaf:
    """A value without entries.

    Args:
        rule: What it must be, in words.
        holds: Whether a value is that.
    """

    rule: str
    holds: Callable[[Any], bool]

    def check(self, path: str, value: Any) -> None:
        """See `Schema`."""
        if not self.holds(value):
            raise ValueError(f"`state_dict` must have {self.rule} at {path}, got {shown(value)}.")


def is_dense_tensor(value: Any) -> bool:
    """Return whether a value is a dense tensor of real or complex numbers, with values."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        return False
    return value.is_floating_point() or value.is_complex()


def _is_number(value: Any) -> bool:
    """Return whether a value is an integer of any size, or a float that is not NaN."""
    if isinstance(value, float):
        return not isnan(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    """Return whether a value is an integer of any size, or a finite float."""
    return _is_number(value) and (isinstance(value, int) or isfinite(value))


NUMBER = Leaf("a number", _is_number)
FINITE = Leaf("a finite number", _is_finite)
NOT_NEGATIVE = Leaf("a finite number that is not negative", lambda v: _is_finite(v) and v >= 0)
POSITIVE = Leaf("a positive finite number", lambda v: _is_finite(v) and v > 0)
COUNT = Leaf(
    "an integer that is not negative",
    lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0,
)
FLAG = Leaf("True or False", lambda v: isinstance(v, bool))
INTEGER = Leaf("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool))
TEXT = Leaf("a text", lambda v: isinstance(v, str))
NOTHING = Leaf("None", lambda v: v is None)


def tensor_of(shape: Sequence[int], *, is_complex: bool = False) -> Leaf:
    """Return the schema of a dense tensor of finite numbers.

    Args:
        shape: Its shape.
        is_complex: Whether the numbers may be complex.
    """

    def holds(value: Any) -> bool:
        if not is_dense_tensor(value) or tuple(value.shape) != tuple(shape):
            return False
        return bool(value.isfinite().all()) and (is_complex or not value.is_complex())

    kind = "floating-point or complex" if is_complex else "floating-point"
    return Leaf(f"a dense {kind} tensor of finite numbers of shape {list(shape)}", holds)


def squares_of(shape: Sequence[int], *, is_complex: bool = False) -> Leaf:
    """Return the schema of a dense tensor of finite numbers that are not negative.

    Args:
        shape: Its shape.
        is_complex: Whether the numbers may be complex, with such real and imaginary parts.
    """
    known = tensor_of(shape, is_complex=is_complex)

    def holds(value: Any) -> bool:
        return known.holds(value) and bool((_by_part(value) >= 0).all())

    return Leaf(f"{known.rule}, none of them negative,", holds)


def _by_part(value: Tensor) -> Tensor:
    """Return real and imaginary parts of complex numbers; others as they are."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def constant(expected: str) -> Leaf:
    """Return the schema of one text."""
    return Leaf(repr(expected), lambda value: isinstance(value, str) and value == expected)


@dataclass(frozen=True)
class Maybe:
    """Something or ``None``.

    Args:
        schema: The schema of something.
    """

    schema: Schema

    def check(self, path: str, value: Any) -> None:
        """See `Schema`."""
        if value is not None:
            self.schema.check(path, value)


@dataclass(frozen=True)
class Anything:
    """A value that another check takes care of."""

    def check(self, path: str, value: Any) -> None:
        """See `Schema`."""


@dataclass(frozen=True)
class Record:
    """A dictionary with given keys.

    Args:
        entries: The schema of each entry.
        optional: Whether entries may be missing.
    """

    entries: Mapping[str, Schema]
    optional: bool = False

    def check(self, path: str, value: Any) -> None:
        """See `Schema`."""
        _check_dictionary(path, value)
        missing = () if self.optional else self.entries.keys() - value.keys()
        if differ := sorted(map(repr, [*missing, *(value.keys() - self.entries.keys())])):
            raise ValueError(
                f"`state_dict` must have the entries {', '.join(self.entries)} at {path}, differs "
                f"in {', '.join(differ)}."
            )
        for name, own in value.items():
            self.entries[name].check(f"{path}.{name}", own)


@dataclass(frozen=True)
class OneType:
    """A dictionary whose tensors are of one data type.

    Args:
        schema: The schema of the dictionary.
    """

    schema: Schema

    def check(self, path: str, value: Any) -> None:
        """See `Schema`."""
        self.schema.check(path, value)
        types = {name: own.dtype for name, own in value.items() if isinstance(own, Tensor)}
        if len(set(types.values())) > 1:
            raise ValueError(
                f"`state_dict` must have tensors of one data type at {path}, got {shown(types)}."
            )


@dataclass(frozen=True)
class Each:
    """A dictionary with any names as keys.

    Args:
        schema: The schema of each entry.
    """

    schema: Schema

    def check(self, path: str, value: Any) -> None:
        """See `Schema`."""
        _check_dictionary(path, value)
        for name, own in value.items():
            if not isinstance(name, str):
                raise ValueError(f"`state_dict` must have names at {path}, got {shown(name)}.")
            self.schema.check(f"{path}.{name}", own)


@dataclass(frozen=True)
class Listed:
    """A list or a tuple.

    Args:
        schema: The schema of each entry.
        size: Number of entries, any by default.
    """

    schema: Schema
    size: int | None = None

    def check(self, path: str, value: Any) -> None:
        """See `Schema`."""
        if not isinstance(value, (list, tuple)) or self.size not in (None, len(value)):
            count = "" if self.size is None else f" of {self.size} entries"
            raise ValueError(f"`state_dict` must have a list{count} at {path}, got {shown(value)}.")
        for index, own in enumerate(value):
            self.schema.check(f"{path}.{index}", own)


def _check_dictionary(path: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"`state_dict` must have a dictionary at {path}, got {shown(value)}.")
