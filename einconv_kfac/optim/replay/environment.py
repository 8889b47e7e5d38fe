"""The state outside of a model's arguments that a forward pass depends on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ONE_THREAD = threading.RLock()
"""Held while something is changed that torch has once for all threads: the random state, the
choice of attention kernels, forward mode."""


@dataclass(frozen=True)
class Autocast:
    """The settings of autocast on one type of device.

    Args:
        device_type: The type of device.
        enabled: Whether operations run in a lower precision.
        dtype: The data type of that precision.
    """

    device_type: str
    enabled: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Environment:
    """Everything that a forward pass depends on besides its arguments and parameters.

    Args:
        cpu_random: State of torch's global random generator.
        cuda_random: States of the generators of CUDA devices, by the device's index.
        autocast: The settings of autocast.
        buffers: Copies of buffers that the pass may change, by name.
    """

    cpu_random: Tensor
    cuda_random: dict[int, Tensor]
    autocast: Autocast
    buffers: dict[str, Tensor]

    @staticmethod
    def now(model: nn.Module, buffers: dict[str, Tensor]) -> Environment:
        """Return the present environment of a model, with the given copies of its buffers."""
        devices = {parameter.device for parameter in model.parameters()}
        kind = next(iter(devices)).type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        indices = {device.index for device in devices if device.type == "cuda"}
        cuda = {index: torch.cuda.get_rng_state(index) for index in indices}
        return Environment(torch.get_rng_state(), cuda, Autocast(kind, enabled, dtype), buffers)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore random states and autocast inside the block.

        After the block, both are what they were before it. Buffers are restored by
        `ModelCall.run`, which passes the copies to the model.
        """
        autocast = torch.autocast(
            self.autocast.device_type,
            dtype=self.autocast.dtype,
            enabled=self.autocast.enabled,
            cache_enabled=False,
        )
        with ONE_THREAD, torch.random.fork_rng(devices=list(self.cuda_random)), autocast:
            torch.set_rng_state(self.cpu_random)
            for index, state in self.cuda_random.items():
                torch.cuda.set_rng_state(state, index)
            yield

    def precision(self, dtype: torch.dtype) -> float:
        """Return the machine epsilon of computations whose result has a data type."""
        return torch.finfo(self.autocast.dtype if self.autocast.enabled else dtype).eps
