"""Counts of the tensor operations that a block of code starts, and of its waits for the device."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OUTSIDE = "forward and backward"
"""The component of operations that no function of the package started."""
COMPONENTS = (
    ("inversion", ("curvature/blocks/cholesky.py", "curvature/blocks/eigen.py"), ""),
    ("inversion", ("optim/factors/refresh.py",), ""),
    ("preconditioning", ("optim/factors/curvature.py",), "precondition"),
    ("factors", ("optim/factors/collector.py",), "_add_"),
    ("factors", ("optim/factors/curvature.py",), "update_"),
    (
        "quadratic model",
        (
            *("optim/replay/jvp.py", "optim/replay/layer_jvp.py", "optim/replay/replay.py"),
            *("optim/step/fits/quadratic_model.py", "optim/step/fits/subspace.py"),
            *("optim/step/comparison/reduction.py", "optim/step/momentum/layer_gains.py"),
            *("optim/step/rounding.py", "optim/step/damping/"),
        ),
        "",
    ),
    ("hooks", ("optim/recording/", "optim/replay/", "curvature/estimation/capture.py"), ""),
    ("momentum, update", ("",), ""),
)
"""Components of a step: files, and a part of the name of their functions. The first one counts that
has a function among the callers of the operation."""

ALLOCATIONS = frozenset(
    {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "lift"}
)
QUESTIONS = frozenset(
    {"promote_types", "result_type", "can_cast", "is_same_size", "_has_same_storage_numel"}
)
"""Operations on the host about data types and shapes."""
REINTERPRETATIONS = frozenset({"_unsafe_view", "_reshape_alias", "detach", "alias", "_make_dual"})
WAITING = frozenset({"_local_scalar_dense", "is_nonzero", "equal", "_linalg_check_errors"})
WAITING_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
BY_MASK = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
HOST_COPIES = ("tolist", "cpu", "numpy")
"""Methods of tensors that copy to the host, without an operation if the tensor is there."""


class OperationCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations and waits by component, while it is active.

    Views and allocations are no operations. A call of ``torch._foreach_*`` is one. The host waits
    for the device where it reads a number, or where the size of a result depends on one.

    Args:
        package: Folder of the package.
    """

    def __init__(self, package: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._root = f"{package}/"
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._ranks: dict[tuple[str, str], int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count an operation, and run it."""
        waits = _waits(func, args)
        if waits or not _is_free(func):
            component = self.component()
            self.operations[component] += not waits
            self.waits[component] += waits
        return func(*args, **(kwargs or {}))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside the block, copies of tensors that are on the host among them.

        What is read because it is on a processor is left out: tensors say that they are not.
        """
        originals = {name: getattr(Tensor, name) for name in HOST_COPIES}
        for name, original in originals.items():
            setattr(Tensor, name, self._counted(original))
        Tensor.is_cpu = property(lambda _: False)  # type: ignore[assignment]
        try:
            with self:
                yield
        finally:
            for name, original in originals.items():
                setattr(Tensor, name, original)
            del Tensor.is_cpu

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that counts as a wait, whatever it does inside."""

        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.waits[self.component()] += 1
            return original(tensor, *args, **kwargs)

        return method

    def component(self) -> str:
        """Return which component of the step is running."""
        frame: FrameType | None = sys._getframe(1)
        first = len(COMPONENTS)
        while frame is not None:
            first = min(first, self._rank(frame.f_code.co_filename, frame.f_code.co_name))
            frame = frame.f_back
        return (*(name for name, *_ in COMPONENTS), OUTSIDE)[first]

    def _rank(self, path: str, function: str) -> int:
        """Return the number of a function's component, the last outside of the package."""
        key = path, function
        if key not in self._ranks:
            own = path.removeprefix(self._root) if path.startswith(self._root) else None
            found = (
                rank
                for rank, (_, places, part) in enumerate(COMPONENTS)
                if own is not None and own.startswith(places) and part in function
            )
            self._ranks[key] = next(found, len(COMPONENTS))
        return self._ranks[key]


def _is_free(func: Any) -> bool:
    """Return whether an operation starts nothing on the device."""
    name = func._schema.name.removeprefix("aten::")
    if name in ALLOCATIONS | QUESTIONS | REINTERPRETATIONS or name.startswith("profiler::"):
        return True
    returned = [each.alias_info for each in func._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def _waits(func: Any, args: Sequence[Any]) -> bool:
    """Return whether the host waits for the result of an operation."""
    name = func._schema.name.removeprefix("aten::")
    if name in BY_MASK:
        return any(each is not None and each.dtype == torch.bool for each in args[1])
    return name in WAITING or (any(tag in func.tags for tag in WAITING_TAGS))
