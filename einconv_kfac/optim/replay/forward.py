"""A forward pass that can be run again exactly as it ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from einconv_kfac.optim.replay.layer_jvp import Kept, portable_recurrence, quick_tangents
from einconv_kfac.optim.replay.loss_input import Place
from einconv_kfac.optim.replay.subsample import Portion, restricted, whole_masks


@dataclass(frozen=True)
class Surroundings:
    """What a forward pass depends on besides its arguments and parameters.

    Args:
        cpu: State of torch's global random generator.
        cuda: The same by CUDA device.
        autocast: Device type, whether autocast is enabled, and its dtype.
        buffers: Copies of buffers that it may change, by name.
    """

    cpu: Tensor
    cuda: dict[int, Tensor]
    autocast: tuple[str, bool, torch.dtype]
    buffers: dict[str, Tensor]

    @staticmethod
    def now(model: nn.Module, buffers: dict[str, Tensor]) -> Surroundings:
        """Return what a forward pass of a model would depend on now, given copies of buffers."""
        devices = {parameter.device for parameter in model.parameters()}
        kind = next(iter(devices)).type
        autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        indices = {device.index for device in devices if device.type == "cuda"}
        cuda = {index: torch.cuda.get_rng_state(index) for index in indices}
        return Surroundings(torch.get_rng_state(), cuda, autocast, buffers)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Go back to them inside the block; the random state after it is that before it."""
        kind, enabled, dtype = self.autocast
        autocast = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
        with torch.random.fork_rng(devices=list(self.cuda)), autocast:
            torch.set_rng_state(self.cpu)
            for index, state in self.cuda.items():
                torch.cuda.set_rng_state(state, index)
            yield


@dataclass(frozen=True)
class ForwardPass:
    """One call of a model.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        surroundings: What else it depended on.
        kept: The outputs of its linear layers, or nothing.
        place: Where the loss took its argument.
        portion: The examples that it is about, if not all.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    surroundings: Surroundings
    kept: Kept
    place: Place
    portion: Portion | None = None

    def of(self, portion: Portion | None) -> ForwardPass:
        """Return the forward pass of a portion of the examples.

        Raises:
            RuntimeError: If an argument of the model does not have the examples first.
        """
        if portion is None:
            return self
        args, kwargs = restricted(portion, self.args, self.kwargs)
        kept = portion.kept(self.kept)
        return replace(self, args=args, kwargs=kwargs, kept=kept, portion=portion)

    def again(self, model: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        """Return what the loss takes from the model, for other parameters.

        Random layers draw what they drew; buffers such as running statistics stay as they are.
        Attention and recurrent layers take the one implementation that has a forward mode and a
        differentiable backward pass.
        """
        values = _values(model, parameters, self.surroundings.buffers)

        def run() -> Any:
            return functional_call(model, values, self.args, self.kwargs, tie_weights=False)

        with ExitStack() as stack:
            stack.enter_context(self.surroundings.restored())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(portable_recurrence(model))
            stack.enter_context(whole_masks(model, self.portion))
            return self.place.found(run)

    def tangent(self, model: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        """Return the same for parameters of the same values with tangents."""
        with quick_tangents(model, self.kept):
            return self.again(model, parameters)


def _values(
    model: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return other parameters and copies of the buffers, by name in each module that has them.

    Each module comes once, since `functional_call` forgets what it replaced in a module that it
    meets under several names.
    """
    copies: dict[Tensor, Tensor] = {}
    values: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None and (start + name in parameters or parameter in copies):
                own = parameters.get(start + name, parameter)
                values[start + name] = copies.setdefault(parameter, own)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if buffer not in copies:
                    copies[buffer] = buffers.get(start + name, buffer).clone()
                values[start + name] = copies[buffer]
    return values
