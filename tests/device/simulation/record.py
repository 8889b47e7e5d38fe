"""What a device was asked to do: launches, waits of the host, and operators that mix devices."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

FOREACH_TENSORS = 40
"""Tensors that one launch of a multi-tensor operator serves, about: its arguments are limited."""

NO_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_reshape_alias", "_unsafe_view", "lift_fresh", "lift", "resize_", "set_"),
    *("_local_scalar_dense", "item", "_make_dual", "_fw_primal", "_unpack_dual", "is_same_size"),
    *("_has_same_storage_numel", "_efficientzerotensor", "is_pinned", "sym_size", "sym_stride"),
    *("sym_numel", "sym_storage_offset", "is_contiguous", "dim", "numel", "size", "stride"),
}
"""Operators without a kernel, besides views."""

HOST_READS = {"_local_scalar_dense", "item"}
"""Operators without a kernel for which the host reads a number."""

WAITS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal"),  # the host reads a number
    *("nonzero", "masked_select", "_unique2", "unique_dim", "bincount"),  # or a size
    *("_linalg_eigh", "_linalg_svd", "linalg_cholesky", "linalg_inv"),  # or whether it failed
    *("linalg_solve", "_linalg_check_errors", "repeat_interleave"),
}
"""Operators for whose result the host waits."""

INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
PACKAGE = "/einconv_kfac/"


class Launch(NamedTuple):
    """An operator on the device.

    Args:
        name: The operator.
        where: File and line of the package that called it.
        kernels: How many are started.
        moved: Bytes of operands and results.
        operations: Floating point operations of matrix products.
    """

    name: str
    where: str
    kernels: int
    moved: int
    operations: int


@dataclass
class Record:
    """Everything noted since the last `reset`; each wait and mixture has its place in the code.

    Attributes:
        waits_aside: Waits of threads beside the main one, which itself waits where it asks for what
            they found.
        races: Reads of what another stream may not have written yet.
        started: Number of launches from the beginning on.
        on_wait: Called before a wait is noted.
    """

    launched: list[Launch] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)
    waits_aside: Counter[str] = field(default_factory=Counter)
    mixtures: Counter[str] = field(default_factory=Counter)
    races: Counter[str] = field(default_factory=Counter)
    started: int = 0
    on_wait: Callable[[str], None] = field(default=lambda what: None)

    def reset(self) -> None:
        """Forget what was noted."""
        self.launched.clear()
        self.waits.clear()
        self.waits_aside.clear()
        self.mixtures.clear()
        self.races.clear()

    @property
    def launches(self) -> int:
        """Number of kernels."""
        return sum(launch.kernels for launch in self.launched)

    @property
    def moved(self) -> int:
        """Bytes that kernels read and wrote."""
        return sum(launch.moved for launch in self.launched)

    @property
    def operations(self) -> int:
        """Floating point operations of matrix products."""
        return sum(launch.operations for launch in self.launched)

    @property
    def waited(self) -> int:
        """How often the host waited for the device."""
        return self.waits.total()

    def places(self) -> Counter[str]:
        """Return the number of kernels by file and line of the package."""
        found: Counter[str] = Counter()
        for launch in self.launched:
            found[launch.where] += launch.kernels
        return found

    def note_wait(self, what: str) -> None:
        """Note that the host waits."""
        self.on_wait(what)
        is_main = threading.current_thread() is threading.main_thread()
        (self.waits if is_main else self.waits_aside)[f"{what} {place()}"] += 1

    def note_race(self, what: str) -> None:
        """Note that something is read which may not be there yet."""
        self.races[f"{what} {place()}"] += 1

    def note_operands(
        self, name: str, args: Sequence[Any], there: Sequence[Tensor], here: Sequence[Tensor]
    ) -> None:
        """Note waits and mixtures of an operator.

        Args:
            name: The operator.
            args: Its arguments.
            there: The tensors among them that are on the device.
            here: The other tensors.
        """
        if name in WAITS:
            self.note_wait(name)
        if name in INDEXING:
            dtypes = {index.dtype for index in args[1] if isinstance(index, Tensor)}
            if dtypes & {torch.bool, torch.uint8}:
                self.note_wait(f"{name} with a mask")
        if name == "copy_":
            if there and here and not (len(args) > 2 and args[2]):  # without waiting
                self.note_wait("copy_ between devices")
        elif name in INDEXING and any(tensor.ndim for tensor in here):
            self.note_wait(f"{name} with an index of the host")
        elif there and here:
            self.mixtures[f"{name} {place()}"] += 1

    def note_launch(self, name: str, args: Sequence[Any], moved: int, operations: int) -> None:
        """Note kernels."""
        self.started += 1
        count = _foreach_launches(args) if name.startswith("_foreach") else 1
        self.launched.append(Launch(name, place(), count, moved, operations))


def _foreach_launches(args: Sequence[Any]) -> int:
    """Return the launches of a multi-tensor operator: one a tensor where layouts differ."""
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg]
    tensors = [found for found in lists if isinstance(found[0], Tensor)]
    alike = all(
        len({(tensor.shape, tensor.stride(), tensor.dtype) for tensor in column}) == 1
        for column in zip(*tensors)
    )
    size = len(tensors[0])
    return -(-size // FOREACH_TENSORS) if alike else size


def place() -> str:
    """Return file and line of the innermost frame in the package, "" outside of it."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if PACKAGE in name:
            return f"{name.rpartition(PACKAGE)[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
