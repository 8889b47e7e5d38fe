"""Scripts whose losses differ between workers, and the same with one worker that accumulates."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
from optim_cases import conv_net, image_batch, weights
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from worker_training import all_weights, sharded, unsynchronized

from einconv_kfac import KFAC, KFACPreconditioner

SIZE, STEPS = 2, 3
FIXED = {"lr": 0.05, "adaptive": False}
MODES: dict[str, dict[str, Any]] = {
    "automatic": {"fisher": "exact"},
    "fixed": {**FIXED, "fisher": "exact"},
    "sampled": {**FIXED, "mc_samples": 2},
    "forward-only": {**FIXED, "fisher": "forward-only"},
    "divided factors": {"fisher": "exact", "divide_factors": True},
}
BASIC = "automatic", "fixed"
"""Modes in which all weights are tried; in the others one worker has examples, the other none."""
WEIGHTS = {
    "zero on the first": (0.0, 1.0),
    "zero on the last": (1.0, 0.0),
    "small on one": (0.25, 1.0),
    "negative on all": (-1.0, -0.5),
    "zero on both": (0.0, 0.0),
    "both signs": (1.0, -0.5),
}
"""The weights of the losses of both workers in the second step; those of others are 1."""


def trained(weights_then: tuple[float, ...], rank: int, size: int, **options: Any) -> Tensor | str:
    """The parameters after each step, or the text of an error.

    Args:
        weights_then: The weights of both workers in the second step.
        rank: The worker's number.
        size: The number of workers; one has the batches of both.
        options: Of the optimizer, and ``reduction`` of the loss.
    """
    module = conv_net()
    loss_fn = nn.CrossEntropyLoss(reduction=options.pop("reduction", "mean"))
    model = module if size == 1 else DistributedDataParallel(module)
    opt, found = KFAC(model, loss_fn, factor_update_period=1, **options), []
    for number in range(STEPS):
        opt.zero_grad()
        for own in range(SIZE) if size == 1 else [rank]:
            x, y = image_batch(8, 10 * number + own)
            weight = weights_then[own] if number == 1 else 1.0
            (loss_fn(model(x), y) * weight * (size / SIZE)).backward()
        try:
            opt.step()
        except RuntimeError as error:
            return str(error)
        found.append(weights(module))
    return torch.stack(found)


def results(rank: int, size: int) -> dict[str, Tensor | str]:
    """What each worker found, by weights, mode and reduction."""
    return {
        f"{name}, {mode}, {reduction}": trained(own, rank, size, **options, reduction=reduction)
        for name, own in WEIGHTS.items()
        for mode, options in MODES.items()
        for reduction in ("mean", "sum")
        if (reduction == "mean" or mode == "fixed") and (mode in BASIC or "zero" in name)
    }


PARTS = "zero", "ignored", "no examples", "longer", "unsynchronized", "not recorded"
"""What the second batch of the last worker has, in steps of two batches."""


def trained_parts(kind: str, rank: int, size: int, **options: Any) -> Tensor:
    """The parameters of a divided model after each step, by one worker or both.

    Args:
        kind: One of `PARTS`.
        rank: The worker's number.
        size: The number of workers; one has the batches of both.
        options: Of the optimizer.
    """
    model, loss_fn = conv_net(), nn.CrossEntropyLoss(reduction="sum")
    model = model if size == 1 else sharded(model)
    opt, found = KFAC(model, loss_fn, factor_update_period=1, **options), []
    for number in range(STEPS):
        opt.zero_grad()
        for part in range(2):
            is_apart = part == 0 and kind == "unsynchronized"
            for own in range(SIZE) if size == 1 else [rank]:
                is_other = part == 1 and own == 1 and number == 1
                lengths = {"no examples": 0, "longer": 13}
                x, y = image_batch(lengths.get(kind, 8) if is_other else 8, 10 * number + own)
                if is_other and kind == "ignored":
                    y = torch.full_like(y, loss_fn.ignore_index)
                weight = 0.0 if is_other and kind == "zero" else 0.1
                is_recorded = not (is_other and kind == "not recorded")
                with unsynchronized(model) if is_apart else nullcontext():
                    loss = loss_fn(model(x), y) if is_recorded else 0 * model(x).sum()
                    (loss * weight * (size / SIZE)).backward()
        opt.step()
        found.append(all_weights(model))
    opt.remove_hooks()
    return torch.stack(found)


EMPIRICAL: dict[str, Any] = {**FIXED, "fisher": "empirical"}
UNRECORDED: dict[str, dict[str, Any]] = {
    "wrapped, fixed": MODES["fixed"],
    "wrapped, scaled": EMPIRICAL,
    "wrapped, preconditioned": {"fisher": "empirical"},
    "divided, fixed": MODES["fixed"],
    "wrapped, automatic": MODES["automatic"],
    "divided, automatic": MODES["automatic"],
}
"""How a model is stored, and how it is trained."""


def trained_without_loss(way: str, rank: int, size: int) -> Tensor | str:
    """The parameters after each step, or the text of an error; the last worker has no loss in one.

    Args:
        way: One of `UNRECORDED`.
        rank: The worker's number.
        size: The number of workers; one has the batches of both.
    """
    module, loss_fn = conv_net(), nn.CrossEntropyLoss()
    wrap = sharded if way.startswith("divided") else DistributedDataParallel
    model = module if size == 1 else wrap(module)
    is_scaled, preconditions = way.endswith("scaled"), way.endswith("preconditioned")
    make: Any = KFACPreconditioner if preconditions else KFAC
    kfac, found = make(model, loss_fn, factor_update_period=1, **UNRECORDED[way]), []
    opt = torch.optim.SGD(module.parameters(), 0.1) if preconditions else kfac
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=is_scaled or preconditions)
    for number in range(STEPS):
        opt.zero_grad()
        for own in range(SIZE) if size == 1 else [rank]:
            x, y = image_batch(8, 10 * number + own)
            is_recorded = number != 1 or own == 0
            loss = loss_fn(model(x), y) if is_recorded else 0 * model(x).sum()
            scaler.scale(loss * (size / SIZE)).backward()  # type: ignore[no-untyped-call]
        if preconditions:
            scaler.unscale_(opt)
            kfac.step()
        try:
            scaler.step(opt)
        except RuntimeError as error:
            return str(error)
        scaler.update()
        found.append(all_weights(model))
    kfac.remove_hooks()
    return torch.stack(found)


def unrecorded_results(rank: int, size: int) -> dict[str, Tensor | str]:
    """What each worker found for losses that are not recorded, by way."""
    if size > 1:
        _set_pg_timeout(timedelta(seconds=60))
    return {way: trained_without_loss(way, rank, size) for way in UNRECORDED}


def divided_results(rank: int, size: int) -> dict[str, Tensor]:
    """What each worker found, by kind and mode."""
    if size > 1:
        _set_pg_timeout(timedelta(seconds=60))  # workers that wait for different messages
    return {
        f"{kind}, {mode}": trained_parts(kind, rank, size, **MODES[mode])
        for kind in PARTS
        for mode in ("automatic", "fixed")
    }
