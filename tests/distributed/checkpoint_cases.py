"""Trainings that go on with another number of workers."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
from optim_cases import image_batch
from torch import Tensor, distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.utils import _pytree
from worker_cases import DIVIDES_ON_CPU, FIXED, MANY, Case, noisy_net
from worker_training import Training, all_weights

SAVED, STEPS = 2, 4
CASES = {
    "automatic": Case({"weight_decay": 0.01}, model=noisy_net),
    "automatic, ekfac": Case({"inverse": "ekfac", "divide_factors": True}, sizes=MANY),
    "sharded, fixed": Case({**FIXED, "fallback": "adam"}, model=noisy_net, sharded=True),
    "sharded, automatic": Case({"weight_decay": 0.01, "divide_factors": True}, sharded=True),
    "fixed, in background": Case(
        {**FIXED, "fallback": "adam", "inverse_in_background": True, "inverse_update_period": 2}
    ),
}


def save(training: Training, folder: str, group: Any) -> None:
    """Save model and optimizer."""
    training.opt.zero_grad()
    model, optimizer = get_state_dict(training.model, training.opt)
    state = {"model": model, "optimizer": optimizer}
    checkpoint.save(state, checkpoint_id=folder, process_group=group)


def save_later(training: Training, folder: str, group: Any) -> Any:
    """Begin to save model and optimizer, and return what waits until they are saved."""
    training.opt.zero_grad()
    model, optimizer = get_state_dict(training.model, training.opt)
    state = {"model": model, "optimizer": optimizer}
    return checkpoint.async_save(state, checkpoint_id=folder, process_group=group)


def warm_up(training: Training) -> None:
    """Run one backward pass, after which `DistributedDataParallel` orders its buckets anew.

    Sums in another order have other last bits, with any optimizer.
    """
    x, y = image_batch()
    training.loss_fn(training.model(x), y).backward()
    training.opt.zero_grad()
    training.opt.discard()


def load(training: Training, folder: str, group: Any) -> None:
    """Load model and optimizer."""
    training.opt.zero_grad()
    model, optimizer = get_state_dict(training.model, training.opt)
    state = {"model": model, "optimizer": optimizer}
    checkpoint.load(state, checkpoint_id=folder, process_group=group)
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(training.model, training.opt, **parts)


def tensors_of(training: Training) -> Tensor:
    """All numbers of the state as one vector."""
    leaves = _pytree.tree_leaves(training.opt.state_dict())
    wholes = [leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for leaf in leaves]
    found = [leaf.double().flatten() for leaf in wholes if isinstance(leaf, Tensor)]
    numbers = [float(leaf) for leaf in leaves if isinstance(leaf, (int, float))]
    return torch.cat([*found, torch.tensor(numbers, dtype=torch.float64)])


def resumed(
    case: Case, rank: int, folder: str, groups: dict[int, Any], *, is_used: bool
) -> dict[str, Any]:
    """The parameters at the end: of a run without a stop, and of others that go on from it.

    Args:
        case: The training.
        rank: The worker's number.
        folder: Where to save.
        groups: Process groups, by the number of workers; one that threads use under 0.
        is_used: Whether as many workers load into an optimizer that has taken a step, and half of
            them into one that has taken none, or the other way round.
    """
    found: dict[str, Any] = {}
    whole = Training(case, rank, 4, groups[4])
    for number in range(STEPS):
        if number == SAVED:
            saving = save_later(whole, f"{folder}/4", groups[0])
            found["state"] = tensors_of(whole)
        whole.step(number)
    saving.result()
    found["whole"] = all_weights(whole.module)
    again = Training(case, rank, 4, groups[4])
    if is_used:
        again.step(0)
    else:
        warm_up(again)
    load(again, f"{folder}/4", groups[4])
    for number in range(SAVED, STEPS):
        again.step(number)
    found["again"] = all_weights(again.module)
    if rank < 2:
        half = Training(case, rank, 2, groups[2])
        if is_used:
            warm_up(half)
        else:
            half.step(0)
        load(half, f"{folder}/4", groups[2])
        half.step(SAVED)
        save(half, f"{folder}/2", groups[2])
    if rank == 0:
        one = Training(case, 0, 1, groups[1])
        load(one, f"{folder}/2", groups[1])
        for number in range(SAVED + 1, STEPS):
            one.step(number)
        found["one"] = all_weights(one.module)
    distributed.barrier()
    return found


def checkpoints(rank: int, size: int) -> dict[str, Any]:
    """What a worker finds, by case."""
    warnings.simplefilter("ignore")
    groups = {n: distributed.new_group(list(range(n or size))) for n in (0, 1, 2, 4)}
    found = {}
    for index, (name, case) in enumerate(CASES.items()):
        if case.sharded and not DIVIDES_ON_CPU:
            continue
        folders = [tempfile.mkdtemp() if rank == 0 else None]
        distributed.broadcast_object_list(folders)
        found[name] = resumed(case, rank, str(folders[0]), groups, is_used=index % 2 == 0)
    return found
