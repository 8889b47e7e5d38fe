"""The state outside of a model's arguments that a forward pass depends on."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from einconv_kfac.curvature.blocks.own_precision import autocast_disabled
from einconv_kfac.optim.model_walk import named_modules, parameters_in

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

    @staticmethod
    def now(device_type: str) -> Autocast:
        """Return the present settings."""
        enabled = torch.is_autocast_enabled(device_type)
        return Autocast(device_type, enabled, torch.get_autocast_dtype(device_type))

    def restored(self) -> torch.autocast:
        """Return a context with these settings."""
        return torch.autocast(
            self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False
        )


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Disable autocast inside the block, on the devices of a model.

    Factors, inverses and steps are computed in the precision of their tensors, also where
    ``backward`` or ``step`` is called inside a block of ``torch.autocast``.
    """
    if not torch._C._is_any_autocast_enabled():
        yield
        return
    kinds = {parameter.device.type for parameter in parameters_in(named_modules(model).values())}
    with autocast_disabled(kinds):
        yield


@dataclass(frozen=True)
class Environment:
    """Everything that a forward pass depends on besides its arguments and parameters.

    Args:
        cpu_random: State of torch's global random generator.
        cuda_random: States of the generators of CUDA devices, by the device's index.
        autocast: The settings of autocast.
        buffers: Copies of buffers that the pass may change, by name.
        training: Whether each module was in training mode.
        rates: The rate of each module that is a dropout, in the same order; ``None`` of others.
        python_random: State of the generator of Python's ``random``; ``None`` if it is not used.
        numpy_random: State of numpy's global generator; ``None`` if it is not used.
    """

    cpu_random: Tensor
    cuda_random: dict[int, Tensor]
    autocast: Autocast
    buffers: dict[str, Tensor]
    training: tuple[bool, ...]
    rates: tuple[float | None, ...] = ()
    python_random: tuple[Any, ...] | None = None
    numpy_random: dict[str, Any] | None = None

    @staticmethod
    def now(
        modules: Collection[nn.Module],
        parameters: Iterable[nn.Parameter],
        buffers: dict[str, Tensor],
    ) -> Environment:
        """Return the present environment of a model, with the given copies of its buffers."""
        devices = {parameter.device for parameter in parameters}
        kind = next(iter(devices)).type
        indices = {device.index for device in devices if device.type == "cuda"}
        cuda = {index: torch.cuda.get_rng_state(index) for index in indices}
        training = tuple(module.training for module in modules)
        rates = tuple(module.p if isinstance(module, _DropoutNd) else None for module in modules)
        autocast, own = Autocast.now(kind), (random.getstate(), _numpy_state())
        return Environment(torch.get_rng_state(), cuda, autocast, buffers, training, rates, *own)

    def after_call(self) -> Environment:
        """Return what a call that has ended depended on; generators only if it drew numbers."""
        python, numpy = self.python_random, self.numpy_random
        if python is not None and random.getstate() == python:
            python = None
        if numpy is not None and _are_equal(numpy, _numpy_state()):
            numpy = None
        if python is self.python_random and numpy is self.numpy_random:
            return self
        return replace(self, python_random=python, numpy_random=numpy)

    @contextmanager
    def restored(self, model: nn.Module) -> Iterator[None]:
        """Restore random states, autocast and training mode inside the block.

        After the block, they are what they were before it. Buffers are restored by
        `Run`, which passes the copies to the model.

        Args:
            model: The model.
        """
        autocast = self.autocast.restored()
        forked = torch.random.fork_rng(devices=list(self.cuda_random))
        modes, others = self._modes_restored(model), self._generators_restored()
        with ONE_THREAD, forked, autocast, modes, others:
            torch.set_rng_state(self.cpu_random)
            for index, state in self.cuda_random.items():
                torch.cuda.set_rng_state(state, index)
            yield

    @contextmanager
    def _generators_restored(self) -> Iterator[None]:
        """Restore the states of Python's ``random`` and of numpy's inside the block."""
        with ExitStack() as stack:
            if self.python_random is not None:
                stack.callback(random.setstate, random.getstate())
                random.setstate(self.python_random)
            if self.numpy_random is not None:
                stack.callback(_numpy().set_state, _numpy_state())
                _numpy().set_state(self.numpy_random)
            yield

    @contextmanager
    def _modes_restored(self, model: nn.Module) -> Iterator[None]:
        """Restore the training mode of each module, and rates of dropout, inside the block."""
        modules = named_modules(model).values()
        switched = [m for m, mode in zip(modules, self.training) if m.training != mode]
        pairs: Iterable[tuple[Any, float | None]] = zip(modules, self.rates)
        rated = [(m, rate, m.p) for m, rate in pairs if rate is not None and m.p != rate]
        for module in switched:
            module.training = not module.training
        for dropout, rate, _ in rated:
            dropout.p = rate
        try:
            yield
        finally:
            for module in switched:
                module.training = not module.training
            for dropout, _, rate in rated:
                dropout.p = rate

    def precision(self, dtype: torch.dtype) -> float:
        """Return the machine epsilon of computations whose result has a data type."""
        return torch.finfo(self.autocast.dtype if self.autocast.enabled else dtype).eps


def _numpy() -> Any:
    """Return the module of numpy's global generator, or ``None`` if the script has not loaded it.

    This package does not depend on numpy.
    """
    return sys.modules.get("numpy.random")


def _numpy_state() -> dict[str, Any] | None:
    """Return the state of numpy's global generator, if there is one."""
    numpy = _numpy()
    state: dict[str, Any] | None = None if numpy is None else numpy.get_state(legacy=False)
    return state


def _are_equal(state: dict[str, Any], other: dict[str, Any] | None) -> bool:
    """Return whether two states of numpy's global generator are the same."""
    if other is None or any(state[n] != other[n] for n in ("has_gauss", "gauss")):
        return False
    own, others = state["state"], other["state"]
    if own.keys() != others.keys() or own.get("pos") != others.get("pos"):
        return False
    return all(
        str(own[n]) == str(others[n]) if n != "key" else bool((own[n] == others[n]).all())
        for n in own
    )


NOT_KEPT = Environment(torch.empty(0), {}, Autocast("cpu", False, torch.float32), {}, ())
"""Stands for the environment of a call that is not replayed."""
