"""Schemas of saved states: what an entry must be, checked before anything is taken over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, Protocol

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


def _is_number_tensor(value: Any) -> bool:
    """Return whether a value is a tensor of real or complex numbers, none of them NaN."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return False
    return not bool(value.isnan().any())


def _is_number(value: Any) -> bool:
    """Return whether a value is an integer of any size, or a float that is not NaN."""
    if isinstance(value, float):
        return not isnan(value)
    return isinstance(value, int) and not isinstance(value, bool)


NUMBER = Leaf("a number", _is_number)
COUNT = Leaf(
    "an integer that is not negative",
    lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0,
)
FLAG = Leaf("True or False", lambda v: isinstance(v, bool))
INTEGER = Leaf("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool))
TEXT = Leaf("a text", lambda v: isinstance(v, str))
FLOATING = Leaf("a floating-point tensor without NaN", _is_number_tensor)


NOTHING = Leaf("None", lambda v: v is None)


def tensor_of(shape: Sequence[int]) -> Leaf:
    """Return the schema of a tensor of real or complex numbers with a shape."""

    def holds(value: Any) -> bool:
        return _is_number_tensor(value) and tuple(value.shape) == tuple(shape)

    return Leaf(f"a floating-point tensor of shape {list(shape)} without NaN", holds)


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
