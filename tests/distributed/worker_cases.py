"""Trainings that several workers and one must do alike, and the script that runs them.

Each step has `PARTS` micro-batches, numbered from 0. Of ``n`` workers, number ``r`` has those
``r, r + n, ..``; one worker accumulates all of them. A case returns the parameters after every
step.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from optim_cases import conv_net, image_batch, weights
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from einconv_kfac import KFAC, KFACPreconditioner

DIVIDES_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""Whether `fully_shard` works on a CPU, which it does not in torch 2.6."""
PARTS, STEPS = 4, 3
BOTH = 2, 4
FIXED = {"lr": 0.05, "adaptive": False}


@dataclass(frozen=True)
class Case:
    """A training.

    Args:
        options: Of the optimizer.
        wrapper: Of `DistributedDataParallel`; ``None`` if the optimizer gets the module inside.
        model: Makes the model.
        loss: Makes the loss.
        compiled: ``"inside"`` or ``"outside"`` of the wrapper.
        sizes: Examples of each micro-batch.
        weighted: Whether each micro-batch has its share of the examples as weight.
        clip: Norm that the gradients are clipped to.
        scaler: Scale of a gradient scaler, and whether it unscales before the step.
        groups: Makes parameter groups.
        preconditions: Whether another optimizer takes the steps.
        whole: Whether one worker with the whole batch must do the same.
        workers: The numbers of workers; without any, every eighth case has 4 and the rest 2.
        sharded: Whether `fully_shard` divides the model and each of its layers.
        whole_options: Other options of the one worker with the whole batch; it is then the only
            one to compare with.
    """

    options: dict[str, Any] = field(default_factory=dict)
    wrapper: dict[str, Any] | None = field(default_factory=dict)
    model: Callable[[], nn.Module] = conv_net
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    compiled: str = ""
    sizes: Sequence[int] = (6, 6, 6, 6)
    weighted: bool = False
    clip: float | None = None
    scaler: tuple[float, bool] | None = None
    groups: Callable[[nn.Module], Any] | None = None
    preconditions: bool = False
    whole: bool = False
    workers: Sequence[int] = ()
    sharded: bool = False
    whole_options: dict[str, Any] | None = None


class Branches(nn.Module):
    """A network of which a micro-batch uses one of two branches, by its first number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 2, 3)
        self.left, self.right = nn.Linear(32, 3), nn.Linear(32, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        hidden = self.first(x).tanh().flatten(1)
        return self.left(hidden) if x[0, 0, 0, 0] > 0 else self.right(hidden)


class Twice(nn.Module):
    """A linear layer whose weight is also used in functions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        scores: Tensor = self.inner(x @ self.inner.weight.t() @ self.inner.weight)
        return scores


def used_twice() -> nn.Module:
    """A network that uses a weight past the calls of its layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), Twice()).double()


def net_of_rows(*rows: int) -> nn.Module:
    """A network with linear layers of so many outputs, before one of 3."""
    torch.manual_seed(0)
    widths = (36, *rows)
    hidden = [m for a, b in zip(widths, rows) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(rows[-1], 3)).double()


def noisy_net() -> nn.Module:
    """A network with batch normalisation, dropout and a layer without factors."""
    return conv_net(random_layers=True)


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups with settings of their own."""
    first, *others = model.parameters()
    own = {"lr": 0.02, "weight_decay": 0.1, "damping": 0.3, "factor_decay": 0.5}
    return [{"params": [first], **own}, {"params": others}]


# Where an eigenvalue of a factor has a multiplicity above one, as 0 has without enough examples,
# the eigenbasis is arbitrary, and the moments in it depend on the last bits of the factor.
MANY = (16,) * PARTS
PERIODS = {"factor_update_period": 2, "inverse_update_period": 3}
SHARDED_WORKERS = {
    **dict.fromkeys(("fixed", "automatic", "few rows on the last"), (4,)),
}
"""The numbers of workers of cases with a divided model, where they are not 2."""
SHARDED = {
    f"sharded, {name}": replace(case, sharded=True, workers=SHARDED_WORKERS.get(name, (2,)))
    for name, case in {
        "fixed": Case({**FIXED, "fisher": "exact"}, whole=True),
        "fixed, reduce": Case({**FIXED, "fisher": "exact", "approximation": "reduce"}, whole=True),
        "fixed, sampled": Case({**FIXED, "mc_samples": 2, "weight_decay": 0.01}),
        "fixed, empirical": Case({**FIXED, "fisher": "empirical", "nesterov": True}, whole=True),
        "fixed, adam": Case({**FIXED, "fallback": "adam", **PERIODS}, model=noisy_net),
        "fixed, ekfac": Case({**FIXED, "inverse": "ekfac"}, sizes=MANY),
        "fixed, decoupled": Case(
            {**FIXED, "max_step_norm": 0.1, "decoupled_weight_decay": True, "weight_decay": 0.1}
        ),
        "fixed, scaler": Case(FIXED, scaler=(64.0, False)),
        "automatic": Case({"fisher": "exact"}, whole=True),
        "automatic, reduce": Case({"fisher": "exact", "approximation": "reduce"}, whole=True),
        "automatic, sampled": Case({"weight_decay": 0.01, **PERIODS}),
        "automatic, exact inverse": Case({"inverse": "exact", "inverse_in_background": True}),
        "automatic, some examples": Case({"curvature_fraction": 0.5, "factor_fraction": 0.5}),
        "automatic, safeguard": Case({"safeguard": True}),
        "automatic, given": Case({"damping": 0.1, "momentum": 0.5}),
        "automatic, noise": Case(model=noisy_net),
        "automatic, groups": Case(groups=two_groups),
        "automatic, decoupled": Case({"decoupled_weight_decay": True, "weight_decay": 0.1}),
        "automatic, clipped": Case(clip=0.1),
        "automatic, scaler, clipped": Case(scaler=(64.0, True), clip=0.1),
        "uneven": Case(sizes=(3, 7, 5, 9)),
        "more workers than rows": Case(model=lambda: net_of_rows(1, 2), clip=0.1),
        "few rows on the last": Case(model=lambda: net_of_rows(5, 3), clip=0.1),
        "used again": Case({"fisher": "exact"}, model=used_twice),
        "compiled": Case(compiled="outside"),
    }.items()
}
DIVIDED = {
    f"divided factors, {name}": replace(case, options={**case.options, "divide_factors": True})
    for name, case in {
        "fixed": Case({**FIXED, "fisher": "exact", **PERIODS}, whole=True),
        "fixed, diagonal": Case({**FIXED, "max_factor_size": 20}, model=noisy_net),
        "fixed, ekfac": Case({**FIXED, "inverse": "ekfac"}, sizes=MANY),
        "fixed, sharded": Case({**FIXED, **PERIODS}, sharded=True, workers=(4,)),
        "automatic": Case({"weight_decay": 0.01}, workers=BOTH),
        "automatic, exact inverse": Case({"inverse": "exact", **PERIODS}),
        "automatic, ekfac": Case({"inverse": "ekfac"}, sizes=MANY),
        "automatic, groups": Case(groups=two_groups),
        "automatic, decoupled": Case({"decoupled_weight_decay": True, "weight_decay": 0.1}),
        "automatic, sharded": Case(sharded=True, workers=(2,)),
        "unused": Case(wrapper={"find_unused_parameters": True}, model=Branches),
        "preconditioner": Case({"fisher": "exact"}, preconditions=True, whole=True),
    }.items()
}
_CASES: dict[str, Case] = {
    "fixed": Case(FIXED, workers=BOTH),
    "fixed, exact Fisher": Case({**FIXED, "fisher": "exact"}, whole=True),
    "fixed, empirical Fisher": Case({**FIXED, "fisher": "empirical"}, whole=True),
    "fixed, forward-only": Case({**FIXED, "fisher": "forward-only"}, whole=True),
    "fixed, reduce": Case({**FIXED, "fisher": "exact", "approximation": "reduce"}, whole=True),
    "fixed, exact inverse": Case({**FIXED, "inverse": "exact", "mc_samples": 2}),
    "fixed, ekfac": Case({**FIXED, "inverse": "ekfac"}, sizes=MANY),
    "fixed, in background": Case({**FIXED, "inverse_in_background": True, **PERIODS}),
    "fixed, sum": Case(
        {**FIXED, "lr": 0.002, "fisher": "exact"}, loss=lambda: nn.CrossEntropyLoss(reduction="sum")
    ),
    "fixed, adam": Case({**FIXED, "fallback": "adam", "weight_decay": 0.01}, model=noisy_net),
    "fixed, bounded": Case(
        {**FIXED, "nesterov": True, "max_step_norm": 0.1, "decoupled_weight_decay": True}
    ),
    "fixed, some examples": Case({**FIXED, "factor_fraction": 0.5}),
    "fixed, groups": Case(FIXED, groups=two_groups),
    "fixed, diagonal factors": Case({**FIXED, "max_factor_size": 20}),
    "automatic": Case(workers=BOTH),
    "automatic, exact Fisher": Case({"fisher": "exact", **PERIODS}, whole=True),
    "automatic, exact inverse": Case({"inverse": "exact", "weight_decay": 0.01}),
    "automatic, ekfac": Case({"inverse": "ekfac"}, sizes=MANY),
    "automatic, empirical, reduce": Case({"fisher": "empirical", "approximation": "reduce"}),
    "automatic, some examples": Case({"curvature_fraction": 0.5, "factor_fraction": 0.5}),
    "automatic, safeguard": Case({"safeguard": True}),
    "automatic, given": Case({"damping": 0.1, "momentum": 0.5}),
    "automatic, noise": Case(model=noisy_net),
    "automatic, sum": Case(loss=lambda: nn.CrossEntropyLoss(reduction="sum")),
    "automatic, groups": Case(groups=two_groups),
    "automatic, clipped": Case(clip=0.1),
    "automatic, scaler": Case(scaler=(64.0, False), clip=None),
    "automatic, scaler, clipped": Case(scaler=(64.0, True), clip=0.1),
    "fixed, scaler": Case(FIXED, scaler=(64.0, False)),
    "uneven": Case(sizes=(3, 7, 5, 9)),
    "uneven, weighted": Case({"fisher": "exact"}, sizes=(3, 7, 5, 9), weighted=True),
    "bare": Case(wrapper=None),
    "bare, fixed": Case(FIXED, wrapper=None),
    "bucket views": Case(wrapper={"gradient_as_bucket_view": True, "bucket_cap_mb": 1}),
    "unused": Case(wrapper={"find_unused_parameters": True}, model=Branches),
    "unused, empirical": Case(
        {**FIXED, "fisher": "empirical"}, wrapper={"find_unused_parameters": True}, model=Branches
    ),
    # torch fails where the first pass of a static graph is one of `no_sync`
    "static graph": Case(wrapper={"static_graph": True}, workers=(4,)),
    "static graph, empirical": Case(
        {"fisher": "empirical"}, wrapper={"static_graph": True}, workers=(4,)
    ),
    "compiled inside": Case(compiled="inside"),
    "compiled outside": Case(compiled="outside"),
    "preconditioner": Case({"fisher": "exact"}, preconditions=True, whole=True),
    # the gradient and the curvature are those of the sum over examples, by the number of workers
    "preconditioner, sum": Case(
        {"fisher": "exact", "damping": 0.1},
        loss=lambda: nn.CrossEntropyLoss(reduction="sum"),
        preconditions=True,
        whole=True,
        workers=(4,),
        whole_options={"damping": 0.4},
    ),
    "preconditioner, ekfac": Case({"inverse": "ekfac"}, sizes=MANY, preconditions=True),
    **SHARDED,
    **DIVIDED,
    "unused, sum": Case(
        {**FIXED, "lr": 0.002, "fisher": "exact"},
        wrapper={"find_unused_parameters": True},
        model=Branches,
        loss=lambda: nn.CrossEntropyLoss(reduction="sum"),
    ),
}
CASES = {
    name: case if case.workers else replace(case, workers=(4 if index % 8 == 1 else 2,))
    for index, (name, case) in enumerate(_CASES.items())
}


def cases_of(size: int) -> dict[str, Case]:
    """The cases for a number of workers that this version of torch has."""
    own = {name: case for name, case in CASES.items() if size == 1 or size in case.workers}
    return {name: case for name, case in own.items() if DIVIDES_ON_CPU or not case.sharded}


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
    model = DistributedDataParallel(model, process_group=group, **(case.wrapper or {}))
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
        given = self.module if case.wrapper is None else self.model
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
        own = range(self.rank, PARTS, self.size)
        data, total = batches(self.case, number), sum(self.case.sizes)
        for part in own:
            share = self.case.sizes[part] / total if self.case.weighted else 1 / PARTS
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
    return torch.stack([training.step(number) for number in range(STEPS)])


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
    for number in range(STEPS):
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
