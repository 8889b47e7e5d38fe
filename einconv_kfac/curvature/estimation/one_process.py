"""Refusal of several processes, between which nothing is shared yet."""

from __future__ import annotations

import torch
from torch import nn


def check_one_process(owner: str) -> None:
    """Raise a ``RuntimeError`` if several processes train together.

    Each would have factors, random samples and step sizes of its own batches, and their
    parameters would drift apart.

    Args:
        owner: Name of the class or the function.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if (size := distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"{owner} must be used in one process, got a process group of {size}: its factors and "
            "step sizes are not shared between processes. Train in one process, without "
            "`init_process_group`."
        )


def check_whole(model: nn.Module, owner: str) -> None:
    """Raise a ``ValueError`` if a parameter is a part of one that is split between devices.

    Args:
        model: The model.
        owner: Name of the class or the function.
    """
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise ValueError(
                f"The parameters of a model for {owner} must be whole tensors, got a DTensor for "
                f"'{name}'. Pass the model before it is distributed (`distribute_module`, "
                "`fully_shard`), and train it in one process."
            )
