"""Which workers train a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from einconv_kfac.distributed.division import check_rows
from einconv_kfac.distributed.shards import WHOLE, DividedModel, WholeModel
from einconv_kfac.distributed.stored import is_divided
from einconv_kfac.distributed.workers import Workers
from einconv_kfac.distributed.wrappers import parallel_wrapper, unwrapped


def workers_of(model: nn.Module, dtype: torch.dtype | None = None) -> Workers:
    """Return the workers that train a model together.

    They are the process group of `DistributedDataParallel`, or the default group for a model that
    is not wrapped.

    Args:
        model: The model.
        dtype: The data type in which sums of matrices are sent; their own for ``None``.

    Raises:
        ValueError: If the model is distributed in another way.
    """
    _check_parallel(model)
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return Workers()
    group = _group_of(model) or distributed.group.WORLD
    assert group is not None
    if distributed.get_world_size(group) == 1:
        return Workers(in_group=True)
    _check_layers(model)
    from einconv_kfac.distributed.process_group import ProcessGroup  # noqa: PLC0415

    wrapper = parallel_wrapper(model)
    return ProcessGroup(group, next(model.parameters()).device, dtype, wrapper)


def parallel_workers_of(model: nn.Module, owner: str) -> Workers:
    """Return the workers of a `DistributedDataParallel`, or one worker if there are no others.

    Args:
        model: The model.
        owner: Name of the function that has it.

    Raises:
        RuntimeError: If there are others and the model is not wrapped.
    """
    workers = workers_of(model)
    if workers.size > 1 and parallel_wrapper(model) is None:
        raise RuntimeError(
            f"{owner} must have the DistributedDataParallel of a model, got the model and a "
            f"process group of {workers.size}. Pass the wrapper, and on each worker its data."
        )
    return workers


def stored_model(model: nn.Module) -> WholeModel:
    """Return how a model is stored: whole on each worker, or divided among them.

    Raises:
        ValueError: If it is divided in another way than by `fully_shard` and by rows.
    """
    inner = unwrapped(model)
    if not any(is_divided(parameter) for parameter in inner.parameters()):
        return WHOLE
    check_rows(inner)
    return DividedModel(inner)


def _group_of(model: nn.Module) -> Any:
    """Return the process group of the workers that average gradients, if they have one."""
    if (wrapper := parallel_wrapper(model)) is not None:
        return wrapper.process_group
    divided: Any = next((p for p in model.parameters() if is_divided(p)), None)
    return None if divided is None else divided.device_mesh.get_group()


def check_whole(model: nn.Module, owner: str) -> None:
    """Raise a ``ValueError`` if a parameter is a part of one that is split between devices.

    Args:
        model: The model.
        owner: Name of the class or the function that has it.
    """
    for name, parameter in model.named_parameters():
        if is_divided(parameter):
            raise ValueError(
                f"The parameters of a model for {owner} must be whole tensors, got a DTensor for "
                f"'{name}'. Pass the model before it is distributed (`distribute_module`, "
                "`fully_shard`), or its torch.nn.parallel.DistributedDataParallel. KFAC takes a "
                "model that `fully_shard` divides."
            )


def _check_parallel(model: nn.Module) -> None:
    """Raise a ``ValueError`` if a model is neither whole on each worker nor alone."""
    for module in model.modules():
        name = type(module).__name__
        is_copied = isinstance(module, nn.DataParallel) and len(module.device_ids) > 1
        if is_copied or name == "FullyShardedDataParallel":
            raise ValueError(
                f"`model` must be a module or its DistributedDataParallel, got {name} on several "
                "devices. Wrap it in "
                "torch.nn.parallel.DistributedDataParallel, with one process for each device."
            )


def _check_layers(model: nn.Module) -> None:
    """Raise a ``ValueError`` if several workers cannot train a model as one worker would."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"`model` must treat the batch of each worker by itself, got '{name}' "
                "(SyncBatchNorm). Use BatchNorm, or a normalisation of single examples."
            )
    wrapper = parallel_wrapper(model)
    if wrapper is not None and wrapper.mixed_precision is not None:
        raise ValueError(
            "`model` must be DistributedDataParallel without `mixed_precision`, which replaces "
            "parameters during calls. Use torch.autocast."
        )
