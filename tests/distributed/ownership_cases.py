"""Trainings whose factors are each on one worker: what workers keep, send and save."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from checkpoint_cases import tensors_of
from optim_cases import conv_net, image_batch
from torch import Tensor, distributed, nn
from worker_cases import FIXED, Case
from worker_training import Training, all_weights

from einconv_kfac import KFAC

OPTIONS: dict[str, dict[str, Any]] = {"fixed": FIXED, "automatic": {}}
PARTS, STEPS, UNFROZEN = 4, 4, 2
Found = dict[str, Any]


def layers_at_hand(opt: Any) -> set[str]:
    """The layers whose factors this worker has."""
    layers = opt._preconditioner.layers
    return {name for name, own in layers.items() if own.factors is not None}


def entries_reduced(action: Callable[[], object]) -> int:
    """The entries of messages that are added up for one worker during an action."""
    counts: list[int] = []
    reduce = distributed.reduce

    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    with mock.patch.object(distributed, "reduce", call):
        action()
    return sum(counts)


def kept(options: dict[str, Any], rank: int, size: int) -> Found:
    """What a worker keeps after some steps, and what is sent in the first."""
    training = Training(Case(options, sizes=(8,) * PARTS), rank, size)
    found: Found = {"reduced": entries_reduced(lambda: training.step(0))}
    training.step(1)
    found["layers"] = layers_at_hand(training.opt)
    found["rows"] = {name: own.rows for name, own in training.opt._preconditioner.layers.items()}
    found["state"] = tensors_of(training)
    found["shapes"] = [
        tuple(factor.shape)
        for layer in training.opt.state_dict()["kfac"]["preconditioner"]["layers"].values()
        for factor in layer["factors"]
    ]
    return found


def unfrozen(options: dict[str, Any], rank: int, size: int) -> Found:
    """The first layer is trained from the third step on; the others keep their owners."""
    model, loss_fn, found = conv_net(), nn.CrossEntropyLoss(), Found()
    model[0].requires_grad_(requires_grad=False)
    opt = KFAC(model, loss_fn, params=[*model.parameters()], **options)
    for step in range(STEPS):
        if step == UNFROZEN:
            found["before"] = layers_at_hand(opt)
            model[0].requires_grad_(requires_grad=True)
        opt.zero_grad()
        for part in range(rank, PARTS, size):
            x, y = image_batch(8, 10 * step + part)
            (loss_fn(model(x), y) * size / PARTS).backward()
        for parameter in model.parameters() if size > 1 else ():
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= size
        opt.step()
    return {**found, "layers": layers_at_hand(opt), "weights": all_weights(model)}


def owned(rank: int, size: int) -> dict[str, Found]:
    """What a worker finds, by case, kind of step, and whether factors are divided."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    return {
        f"{case.__name__}, {mode}, {is_divided}": case(
            {**options, "divide_factors": is_divided}, rank, size
        )
        for case in (kept, unfrozen)
        for mode, options in OPTIONS.items()
        for is_divided in (False, True)
    }
