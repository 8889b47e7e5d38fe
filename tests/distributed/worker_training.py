"""The script that trains a case: as one of several workers, or alone.

Each step has four micro-batches, or two larger ones, numbered from 0. Of ``n`` workers, number
``r`` has those ``r, r + n, ..``; one worker accumulates all of them. A training returns the
parameters after every step.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from optim_cases import conv_net, image_batch, weights
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from worker_cases import FIXED, Case

from einconv_kfac import KFAC, KFACPreconditioner


def batches(case: Case, step: int) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of a step."""
    return [image_batch(size, 100 * step + part) for part, size in enumerate(case.sizes)]


def wrapped(case: Case, model: nn.Module, group: Any = None) -> nn.Module:
    """A model that several workers train."""
    if case.sharded:
        model = sharded(model, group)
        return torch.compile(model, backend="eager") if case.compiled else model
    if case.compiled == "inside":
        model = torch.compile(model, backend="eager")
    model = DistributedDataParallel(model, process_group=group, **case.wrapper)
    return torch.compile(model, backend="eager") if case.compiled == "outside" else model


def sharded(model: nn.Module, group: Any = None) -> nn.Module:
    """A model that `fully_shard` divides, each of its layers first."""
    mesh = DeviceMesh.from_group(distributed.group.WORLD if group is None else group, "cpu")
    for layer in model.children():
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextmanager
def unsynchronized(model: nn.Module) -> Iterator[None]:
    """Leave gradients on each worker inside the block."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, FSDPModule):
        yield
        return
    inner.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        inner.set_requires_gradient_sync(True)


def all_weights(model: nn.Module) -> Tensor:
    """All parameters as one vector, also where workers divide them."""
    found = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return torch.cat([parameter.detach().flatten() for parameter in found])


class Training:
    """A training by one of several workers, or by one alone.

    Args:
        case: What is trained.
        rank: The worker's number.
        size: The number of workers.
        group: Their process group, if it is not the default one.
    """

    def __init__(self, case: Case, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.case, self.rank, self.size = case, rank, size
        self.module, self.loss_fn = case.model(), case.loss()
        is_alone = size == 1 and group is None
        self.model = self.module if is_alone else wrapped(case, self.module, group)
        given = self.module if case.is_inside else self.model
        options = dict(case.options)
        if case.groups is not None:
            options["params"] = case.groups(self.module)
        self.preconditioner = None
        if case.preconditions:
            self.preconditioner = KFACPreconditioner(given, self.loss_fn, **options)
            self.opt: Any = torch.optim.SGD(self.module.parameters(), 0.05, momentum=0.9)
        else:
            self.opt = KFAC(given, self.loss_fn, **options)
        self.scaler = None
        if case.scaler is not None:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=case.scaler[0])

    def step(self, number: int) -> Tensor:
        """Take a step, and return the parameters."""
        self.opt.zero_grad()
        data, total = batches(self.case, number), sum(self.case.sizes)
        own = range(self.rank, len(data), self.size)
        for part in own:
            share = self.case.sizes[part] / total if self.case.weighted else 1 / len(data)
            is_last = part == own[-1]
            with nullcontext() if is_last else unsynchronized(self.model):
                torch.manual_seed(1000 * number + part)
                loss = self.loss_fn(self.model(data[part][0]), data[part][1]) * share * self.size
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._update()
        return all_weights(self.module)

    def _update(self) -> None:
        """Update the parameters from the gradients."""
        if self.scaler is not None and self.case.scaler is not None and self.case.scaler[1]:
            self.scaler.unscale_(self.opt)
        if self.case.clip is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.case.clip)
        if self.preconditioner is not None:
            self.preconditioner.step()
        if self.scaler is not None:
            self.scaler.step(self.opt)
            self.scaler.update()
        else:
            self.opt.step()


def trained(case: Case, rank: int = 0, size: int = 1) -> Tensor:
    """The parameters after each step, ``[steps, parameters]``."""
    training = Training(case, rank, size)
    return torch.stack([training.step(number) for number in range(case.steps)])


def warm_up() -> None:
    """Train a little on one worker, for what is imported and cached on the way."""
    for options in (FIXED, {}, {**FIXED, "inverse": "ekfac"}):
        Training(Case(options)).step(0)
    torch.compile(conv_net(), backend="eager")(image_batch()[0])
    torch.compiler.reset()


def trained_whole(case: Case) -> Tensor:
    """The same by one worker with the whole batch of each step."""
    options = {**case.options, **(case.whole_options or {})}
    whole = Case(**{**vars(case), "sizes": (sum(case.sizes),), "options": options})
    training, found = Training(whole), []
    for number in range(case.steps):
        training.opt.zero_grad()
        xs, ys = zip(*batches(case, number))
        training.loss_fn(training.model(torch.cat(xs)), torch.cat(ys)).backward()
        training._update()
        found.append(weights(training.module))
    return torch.stack(found)


def results_of(run: Callable[[Case], Tensor], cases: dict[str, Case]) -> dict[str, Any]:
    """What a function returns for each case, or the text of its error."""
    found: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            found[name] = run(case)
        except Exception:
            found[name] = traceback.format_exc()
    return found
