"""Modules that torch wraps around a model: of `torch.compile`, and parallel ones.

`DataParallel` on one device, or on none, calls the module itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_PARALLEL = (DataParallel, DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of all wrappers, or the model itself."""
    *_, innermost = _layers_of(model)
    return innermost


def recorded_module(model: nn.Module) -> nn.Module:
    """Return the outermost module whose calls have the arguments that the model receives.

    `DistributedDataParallel` and `DataParallel` move arguments to their device before they call the
    module inside.
    """
    return next(m for m in _layers_of(model) if not isinstance(m, _PARALLEL))


def compiled_wrappers(model: nn.Module) -> list[nn.Module]:
    """Return the wrappers that run compiled code."""
    return [module for module in _layers_of(model) if hasattr(module, "_orig_mod")]


def parallel_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """Return the wrapper that averages gradients, if there is one."""
    found = [m for m in _layers_of(model) if isinstance(m, DistributedDataParallel)]
    return found[0] if found else None


def check_joining(wrapper: DistributedDataParallel, owner: str) -> None:
    """Raise a ``RuntimeError`` if workers that have no more batches join the messages of others.

    Args:
        wrapper: The wrapper.
        owner: Name of the class that takes steps.
    """
    config = getattr(wrapper, "_join_config", None)
    if config is not None and config.enable:
        raise RuntimeError(
            f"Steps of {owner} must be taken by all workers, got one inside of `join`, whose "
            "workers take no more steps once they have no more batches. Give each worker as many "
            "batches, as `DistributedSampler` does, or end the loop on all where the first has "
            "none left."
        )


def _layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model and the modules inside of its wrappers, from the outside in."""
    module: object = model
    while isinstance(module, nn.Module):
        yield module
        if isinstance(module, _PARALLEL):
            module = module.module
        else:
            module = getattr(module, "_orig_mod", None)
