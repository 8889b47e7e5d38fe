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
from typing import Any  # noqa: E402

import streams  # noqa: E402
import torch  # noqa: E402
from graph import Graphs  # noqa: E402
from nesting import leaves_of, mapped  # noqa: E402
from record import HOST_READS, NO_LAUNCH, Record  # noqa: E402
from torch import Generator, Tensor, nn  # noqa: E402
from torch.utils._mode_utils import no_dispatch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402

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

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def simulated(shapes_only: bool = False) -> Iterator[Record]:
    """Run what is inside of the block with the device, and note it from anew."""
    RECORD.reset()
    _OnDevice.shapes_only = shapes_only
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
    name = func.overloadpacket.__name__
    leaves = leaves_of((args, kwargs))
    there = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
    here = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, DeviceTensor)]
    target = kwargs.get("device")
    kind = None if target is None else torch.device(target).type
    if not there and kind != "cuda":
        return func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
    if name == "_to_copy" and kind is not None and (kind == "cpu" or not there):
        RECORD.note_wait(f"copy to {kind}")
    else:
        RECORD.note_operands(name, args, there, here)
    known: dict[int, DeviceTensor] = {id(tensor.held): tensor for tensor in there}
    inner_args, inner_kwargs = mapped(_inner, args), mapped(_inner, kwargs)
    GRAPHS.save(func, inner_args, inner_kwargs)
    result = _compute(func, name, inner_args, inner_kwargs)
    GRAPHS.note(func, name, (inner_args, inner_kwargs), result)
    if not (func.is_view or _OnDevice.shapes_only):
        _note_stream(func, name, inner_args, there, result)
    if not (name in NO_LAUNCH or func.is_view) and there:
        _note_launch(func, name, (args, inner_args, inner_kwargs), there, result)
    for generator in (leaf for leaf in leaves if isinstance(leaf, Generator)):
        if generator.device.type == "cuda":
            LIBRARY.copy_engine(_twins[id(generator)][1]._cdata, generator._cdata)
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():
            func(*args, **kwargs)
        return args[0]
    if kind == "cpu" or (name == "copy_" and not isinstance(args[0], DeviceTensor)):
        return args[0] if name == "copy_" else result

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, DeviceTensor):
            return value
        if value._is_zerotensor():
            value = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        return known[id(value)] if id(value) in known else DeviceTensor(value)

    return mapped(outer, result)


def _note_stream(
    func: Any, name: str, args: tuple[Any, ...], there: list[DeviceTensor], result: Any
) -> None:
    """Note what an operator reads and writes in the present stream."""
    read = [] if name in NO_LAUNCH - HOST_READS else [tensor.held for tensor in there]
    changed = args[0] if func._schema.is_mutable and args else ()
    made = [leaf for leaf in leaves_of((result, changed)) if isinstance(leaf, Tensor)]
    streams.note(RECORD, name, read, made)


def _inner(value: Any) -> Any:
    """Return what an operator on the host gets for an argument."""
    if isinstance(value, DeviceTensor):
        return value.held
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
    func: Any, name: str, arguments: tuple[Any, Any, Any], there: list[Any], result: Any
) -> None:
    """Note what an operator moves and computes."""
    args, inner_args, inner_kwargs = arguments
    old = {id(tensor.held) for tensor in there}
    new = [t for t in leaves_of(result) if isinstance(t, Tensor) and id(t) not in old]
    moved = sum(_bytes(t) for t in (*(tensor.held for tensor in there), *new))
    RECORD.note_launch(name, args, moved, _operations(func, name, inner_args, inner_kwargs, result))


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of memory that a tensor views, each counted once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _operations(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    """Return the floating point operations of a matrix product, 0 for other operators."""
    if name in ("addmm_", "baddbmm_", "addbmm_", "addmm", "baddbmm"):
        return 2 * args[1].numel() * args[2].shape[-1]
    count = flop_registry.get(func.overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


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
