"""A forward pass that can be run again exactly as it ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Surroundings:
    """What a forward pass depends on besides its arguments: random state and autocast.

    Args:
        cpu: State of torch's global random generator.
        cuda: The same by CUDA device.
        autocast: Device type, whether autocast is enabled, and its dtype.
    """

    cpu: Tensor
    cuda: dict[int, Tensor]
    autocast: tuple[str, bool, torch.dtype]

    @staticmethod
    def now(model: nn.Module) -> Surroundings:
        """Return what a forward pass of a model would depend on now."""
        devices = {parameter.device for parameter in model.parameters()}
        kind = next(iter(devices)).type
        autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        indices = {device.index for device in devices if device.type == "cuda"}
        cuda = {index: torch.cuda.get_rng_state(index) for index in indices}
        return Surroundings(torch.get_rng_state(), cuda, autocast)

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
    """One call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    surroundings: Surroundings
    output: Any

    def again(self, model: nn.Module, parameters: dict[str, Tensor]) -> Any:
        """Return the model's output for other parameters.

        Random layers draw what they drew; buffers such as running statistics stay as they are.
        Attention takes the one implementation that has a forward mode.
        """
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with self.surroundings.restored(), sdpa_kernel(SDPBackend.MATH):
            return functional_call(model, {**buffers, **parameters}, self.args, self.kwargs)
