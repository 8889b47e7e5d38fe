"""Functions of torch that a module calls, replaced while it runs by equal ones that record.

Attention and recurrent layers apply their weights inside functions of torch, where hooks see
nothing. While such a module runs and its calls are recorded, a `TorchFunctionMode` replaces the
function. The module itself stays as it is, with two hooks that do nothing in its copies.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from einconv_kfac.curvature.layers.layer_rule import Record
from einconv_kfac.curvature.module_hooks import InactiveHook, ModuleHook, is_compiling

Records: TypeAlias = "Mapping[str, Record]"
"""What takes the calls of each weight of a module, by the weight's name in the module."""
Replacement: TypeAlias = Callable[..., Any]
"""Takes the module, its records, the function of torch, and the arguments of that."""
Ownership: TypeAlias = Callable[[nn.Module, Sequence[Any]], bool]
"""Returns whether the arguments of a function of torch are those of a module's own call."""


def has_parameter(module: nn.Module, args: Sequence[Any]) -> bool:
    """Return whether arguments have a parameter of the module, as those of no other call."""
    parts = (part if isinstance(part, list) else (part,) for part in args)
    given = {id(value) for part in parts for value in part}
    return any(id(p) in given for p in module._parameters.values() if p is not None)


def intercepted(
    module: nn.Module,
    weight: str,
    record: Record,
    replacements: Mapping[str, Replacement],
    is_own: Ownership = has_parameter,
) -> Callable[[], None]:
    """Replace functions that a module calls from now on; return a function that ends it.

    Several weights of one module are recorded together: the replacement is called once.

    Args:
        module: The module.
        weight: Name of a weight in the module.
        record: Takes the calls of that weight.
        replacements: By the names of functions; the same for all weights of a module.
        is_own: The same for all weights of a module.
    """
    interception = _INTERCEPTIONS.get(module)
    if interception is None:
        interception = _INTERCEPTIONS[module] = _Interception(module, replacements, is_own)
    own = interception.records[weight]
    own.append(record)

    def undo() -> None:
        own.remove(record)
        if not any(interception.records.values()):
            interception.remove()
            if _INTERCEPTIONS.get(module) is interception:
                del _INTERCEPTIONS[module]

    return undo


@contextmanager
def closed_interceptions() -> Iterator[None]:
    """End interceptions of calls inside the block that it left by an exception past torch's hooks.

    torch runs no hooks after a call that raises an exception that is no ``Exception``.
    """
    entered = _entered()
    count = len(entered)
    try:
        yield
    finally:
        while len(entered) > count:
            entered[-1].__exit__(None, None, None)


class _Interception:
    """The hooks of a module, before and after its forward pass.

    Args:
        module: The module, to which no reference is kept.
        replacements: See `intercepted`.
        is_own: See `intercepted`.
    """

    def __init__(
        self, module: nn.Module, replacements: Mapping[str, Replacement], is_own: Ownership
    ) -> None:
        self.records: dict[str, list[Record]] = defaultdict(list)
        self._replacements, self._is_own = replacements, is_own
        self._running = threading.local()
        before = module.register_forward_pre_hook(_Hook(self._enter))
        leave = _Hook(self._leave)
        after = module.register_forward_hook(leave, prepend=True, always_call=True)
        self._handles = before, after

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, *_: object) -> None:
        if is_compiling():
            return
        self._drop_interrupted_()
        active = {
            weight: [record for record in records if getattr(record, "is_active", True)]
            for weight, records in self.records.items()
        }
        mode: _Mode | None = None
        if any(active.values()):
            joined = {weight: _joined(records) for weight, records in active.items() if records}
            mode = _Mode(module, joined, self._replacements, self._is_own)
            mode.__enter__()
        self._modes().append(mode)

    def _drop_interrupted_(self) -> None:
        """End the mode of a call that was interrupted, as by the keyboard, if it is the last."""
        modes = self._modes()
        while modes:
            mode = modes.pop()
            last = _get_current_function_mode()  # type: ignore[no-untyped-call]
            if mode is not None and last is mode:
                mode.__exit__(None, None, None)

    def _leave(self, *_: object) -> None:
        if is_compiling() or not self._modes():
            return
        mode = self._modes().pop()
        if mode is not None:
            mode.__exit__(None, None, None)

    def _modes(self) -> list[_Mode | None]:
        """Return the modes of the calls that this thread runs."""
        modes: list[_Mode | None] = self._running.__dict__.setdefault("modes", [])
        return modes


_INTERCEPTIONS: WeakKeyDictionary[nn.Module, _Interception] = WeakKeyDictionary()


class _Mode(TorchFunctionMode):
    """Replaces functions by name.

    Args:
        module: The module that runs.
        records: See `Replacement`.
        replacements: See `intercepted`.
        is_own: See `intercepted`.
    """

    def __init__(
        self,
        module: nn.Module,
        records: Records,
        replacements: Mapping[str, Replacement],
        is_own: Ownership,
    ) -> None:
        super().__init__()
        self._module, self._records, self._replacements = module, records, replacements
        self._is_own = is_own

    def __enter__(self) -> _Mode:
        """Enter the context."""
        super().__enter__()  # type: ignore[no-untyped-call]
        _entered().append(self)
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the context."""
        entered = _entered()
        if self in entered:
            entered.remove(self)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        replacement = self._replacements.get(getattr(func, "__name__", ""))
        options = kwargs or {}
        if replacement is None or not self._is_own(self._module, [*args, *options.values()]):
            return func(*args, **options)
        return replacement(self._module, self._records, func, *args, **options)


_THREAD = threading.local()


def _entered() -> list[_Mode]:
    """Return the modes that this thread has entered and not left, in their order."""
    found: list[_Mode] = _THREAD.__dict__.setdefault("entered", [])
    return found


class _Hook(ModuleHook):
    """A hook of a module, which does nothing in copies of the module.

    Args:
        action: Takes what the hook is called with.
    """

    def __init__(self, action: Callable[..., None]) -> None:
        self._action = action

    def __call__(self, *args: object) -> None:
        self._action(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return InactiveHook, ()


def _joined(records: list[Record]) -> Record:
    """Return what passes a call on to several records."""

    def record(*call: Any) -> None:
        for own in records:
            own(*call)

    return records[0] if len(records) == 1 else record
