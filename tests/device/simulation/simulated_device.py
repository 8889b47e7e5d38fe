"""A CUDA device that is simulated by the processor; import it before torch, as a plugin of pytest.

A `DeviceTensor` says that it is on "cuda:0" and holds a tensor of the host. Inside of `simulated`,
a dispatch mode runs every operator on what is held, and notes launches, waits and mixtures of
devices in `RECORD`. Autograd, forward mode, autocast and generators run as on CUDA.

With ``shapes_only=True`` tensors have no values, so that layers of real networks cost nothing; then
the host must not ask for a number.

Limits: operators count, not the kernels inside of them; nothing is said about time.
"""

from __future__ import annotations

import guard

LIBRARY = guard.load()

from collections.abc import Iterator  # noqa: E402
from concurrent import futures  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from types import NoneType  # noqa: E402
from typing import Any  # noqa: E402

import streams  # noqa: E402
import torch  # noqa: E402
from graph import Graphs  # noqa: E402
from nesting import leaves_of, mapped  # noqa: E402
from operators import OPERATORS, Operator  # noqa: E402
from record import Record  # noqa: E402
from torch import Generator, Tensor, nn  # noqa: E402
from torch.utils._mode_utils import no_dispatch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

CUDA = torch.device("cuda", 0)
RECORD = Record()
_default_generator = Generator(CUDA)
_twins: dict[int, tuple[Generator, Generator]] = {}


class DeviceTensor(Tensor):
    """A tensor that says it is on the device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> DeviceTensor:
        """Wrap a tensor of the host."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=CUDA,
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator outside of the mode."""
        return run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.held})"

    def tolist(self) -> Any:
        """Return the values as numbers."""
        RECORD.note_wait("tolist")
        streams.note(RECORD, "tolist", [self.held], [])
        return self.held.tolist()

    def record_stream(self, stream: Any) -> None:
        """Keep the memory until a stream has read it; here it is kept as long as the tensor."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_without_lists(index), value)

    def __deepcopy__(self, memo: Any) -> Tensor:
        with torch.no_grad():
            copied = DeviceTensor(self.held.clone(), self.requires_grad)
        is_parameter = getattr(self, "_is_param", False)
        return nn.Parameter(copied, self.requires_grad) if is_parameter else copied


def _without_lists(index: Any) -> tuple[Any, ...]:
    """Return an index whose lists are on the device; torch copies them there, and waits."""
    found: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, list):
            RECORD.note_wait("a list as an index")
            found.append(DeviceTensor(torch.tensor(part)))
        else:
            found.append(part)
    return tuple(found)


def held(value: Any) -> Any:
    """Return a value with the host's tensors in place of the device's, in any structure."""
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, DeviceTensor) else leaf, value)


class _OnDevice(TorchDispatchMode):
    """Runs every operator, also those that make the first tensor on the device."""

    shapes_only = False
    measures = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and torch's wrapper costs as much as a small operator."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def simulated(shapes_only: bool = False, measures: bool = False) -> Iterator[Record]:
    """Run what is inside of the block with the device, and note it from anew.

    Args:
        shapes_only: Whether tensors have no values.
        measures: Whether bytes and operations are counted, as they are for shapes alone.
    """
    RECORD.reset()
    _OnDevice.shapes_only, _OnDevice.measures = shapes_only, measures or shapes_only
    with torch.autograd.set_multithreading_enabled(False), _OnDevice():
        yield RECORD


def to_device(value: Any) -> Any:
    """Return a copy of a tensor on the device, or move a model there, in place."""
    if isinstance(value, nn.Module):
        return _module_to_device(value)
    with torch.no_grad():
        copied = value.detach().to("meta" if _OnDevice.shapes_only else "cpu", copy=True)
        streams.forget(copied)
        return DeviceTensor(copied)


def _module_to_device(model: nn.Module) -> nn.Module:
    """Replace the parameters and the buffers of a model."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                new = nn.Parameter(to_device(parameter), parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), new)  # type: ignore
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = to_device(buffer)
    return model


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on what its tensors hold, and note it."""
    own = OPERATORS.get(func) or OPERATORS.setdefault(func, Operator.of(func))
    name = own.name
    there: list[DeviceTensor] = []
    other: list[Any] = []
    inner_args = _taken(args, there, other)
    inner_kwargs = _taken(kwargs, there, other) if kwargs else {}
    target = kwargs.get("device") if kwargs else None
    kind = None if target is None else torch.device(target).type
    if not there and kind != "cuda":
        return func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
    here = [leaf for leaf in other if isinstance(leaf, Tensor)] if other else other
    if name == "_to_copy" and kind is not None and (kind == "cpu" or not there):
        RECORD.note_wait(f"copy to {kind}")
    else:
        RECORD.note_operands(name, args, there, here)
    if other:
        inner_args, inner_kwargs = mapped(_inner, inner_args), mapped(_inner, inner_kwargs)
    GRAPHS.save(func, inner_args, inner_kwargs)
    result = _compute(func, name, inner_args, inner_kwargs)
    GRAPHS.note(func, name, (inner_args, inner_kwargs), result)
    if not own.is_view:
        made = [leaf for leaf in leaves_of(result) if isinstance(leaf, Tensor)]
        if not _OnDevice.shapes_only:
            _note_stream(own, inner_args, there, made)
        if own.launches and there:
            _note_launch(own, (args, inner_args, inner_kwargs), there, made, result)
    for leaf in other:
        if isinstance(leaf, Generator) and leaf.device.type == "cuda":
            LIBRARY.copy_engine(_twins[id(leaf)][1]._cdata, leaf._cdata)
    if own.changes_view:
        with no_dispatch():
            func(*args, **kwargs)
        return args[0]
    if kind == "cpu" or (name == "copy_" and not isinstance(args[0], DeviceTensor)):
        return args[0] if name == "copy_" else result
    return _outer(result, there)


HOST_ONLY = {int, float, bool, complex, str, NoneType, torch.dtype, torch.layout}
"""Types of arguments that every device takes as they are."""


def _taken(value: Any, there: list[DeviceTensor], other: list[Any]) -> Any:
    """Return a structure with what the device's tensors hold, and gather its leaves.

    Args:
        value: Arguments of an operator.
        there: Where to add the tensors on the device.
        other: Where to add tensors of the host, devices and generators.
    """
    kind = type(value)
    if kind is DeviceTensor:
        there.append(value)
        return value.held
    if kind in HOST_ONLY:
        return value
    if kind is tuple or kind is list:
        return kind([_taken(part, there, other) for part in value])
    if kind is dict:
        return {key: _taken(part, there, other) for key, part in value.items()}
    other.append(value)
    return value


def _outer(value: Any, there: list[DeviceTensor]) -> Any:
    """Return what the caller gets for a result: an operand if that is what was changed."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([_outer(part, there) for part in value])
    if not isinstance(value, Tensor) or kind is DeviceTensor:
        return value
    for tensor in there:
        if tensor.held is value:
            return tensor
    if value._is_zerotensor():
        value = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return DeviceTensor(value)


def _note_stream(
    own: Operator, args: tuple[Any, ...], there: list[DeviceTensor], made: list[Tensor]
) -> None:
    """Note what an operator reads and writes in the present stream."""
    read = [tensor.held for tensor in there] if own.reads else []
    if own.is_mutable and args:
        made = made + [leaf for leaf in leaves_of(args[0]) if isinstance(leaf, Tensor)]
    streams.note(RECORD, own.name, read, made)


def _inner(value: Any) -> Any:
    """Return what an operator on the host gets for an argument."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("meta" if _OnDevice.shapes_only else "cpu")
    if isinstance(value, Tensor) and _OnDevice.shapes_only:
        return value.to("meta")
    return _twin(value) if isinstance(value, Generator) else value


def _twin(generator: Generator) -> Generator:
    """Return a generator of the host with the engine of one of the device."""
    if generator.device.type != "cuda":
        return generator
    _, twin = _twins.setdefault(id(generator), (generator, Generator()))
    LIBRARY.copy_engine(generator._cdata, twin._cdata)
    return twin


def _compute(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the host; batch norm of cuDNN and mixed products by torch's own."""
    if name == "cudnn_batch_norm":
        y, mean, scale = torch.ops.aten.native_batch_norm(*args, **kwargs)
        return y, mean, scale, torch.empty(0, dtype=torch.uint8, device=y.device)
    if name == "cudnn_batch_norm_backward":
        x, g, weight, running_mean, running_var, mean, scale, eps, _ = args
        saved = (weight, running_mean, running_var, mean, scale, True, eps, [True] * 3)
        return torch.ops.aten.native_batch_norm_backward(g, x, *saved)
    if func._overloadname == "dtype_out" and name in ("addmm", "baddbmm"):
        return _mixed_product(name, *args, **kwargs)
    return func(*args, **kwargs)


def _mixed_product(
    name: str, start: Tensor, left: Tensor, right: Tensor, dtype: Any, *, out: Tensor, **scales: Any
) -> Tensor:
    """Add a product of low precision to a target in float32, as only GPUs do."""
    assert left.dtype == right.dtype
    assert left.dtype in (torch.bfloat16, torch.float16)
    assert start.dtype == out.dtype == dtype == torch.float32
    add = getattr(torch, name)
    return out.copy_(add(start, left.float(), right.float(), **scales))


def _note_launch(
    own: Operator, arguments: tuple[Any, Any, Any], there: list[Any], made: list[Any], result: Any
) -> None:
    """Note what an operator moves and computes."""
    args, inner_args, inner_kwargs = arguments
    if not _OnDevice.measures:
        RECORD.note_launch(own.name, args, 0, 0)
        return
    held = [tensor.held for tensor in there]
    known = {id(tensor) for tensor in held}
    moved = sum(map(_bytes, held)) + sum(_bytes(t) for t in made if id(t) not in known)
    RECORD.note_launch(own.name, args, moved, own.operations(inner_args, inner_kwargs, result))


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of memory that a tensor views, each counted once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


GRAPHS = Graphs(_compute, RECORD)
streams.Event.record_of, streams.Event.refuse = RECORD, GRAPHS.refuse


def _waited(*args: Any, **kwargs: Any) -> Any:
    """Wait for threads, which may themselves wait for the device."""
    RECORD.note_wait("threads")
    return _wait(*args, **kwargs)


_wait = futures.wait


def _announce() -> None:
    """Have ``torch.cuda`` say that there is one device."""
    futures.wait = _waited
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.get_rng_state = lambda device=CUDA: _default_generator.get_state()
    torch.cuda.set_rng_state = lambda state, device=CUDA: _default_generator.set_state(state)
    torch.backends.cudnn.is_acceptable = lambda tensor: False  # its RNNs have no simulation
    torch.cuda.current_stream = streams.current_stream  # type: ignore
    torch.cuda.Stream = streams.Stream  # type: ignore
    torch.cuda.Event = streams.Event  # type: ignore
    torch.cuda.CUDAGraph = GRAPHS.new  # type: ignore
    torch.cuda.graph = GRAPHS.capturing  # type: ignore
    torch.cuda.is_current_stream_capturing = lambda: GRAPHS.is_capturing
    torch.cuda.is_initialized = lambda: GRAPHS.is_capturing  # as little as it needs
    torch.cuda.stream = lambda stream: streams.Inside(stream, _OnDevice)  # type: ignore


_announce()
