"""Trainings that several workers and one must do alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from optim_cases import conv_net
from torch import Tensor, nn

DIVIDES_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""Whether `fully_shard` works on a CPU, which it does not in torch 2.6."""
PARTS = 4
BOTH = 2, 4
FIXED = {"lr": 0.05, "adaptive": False}


@dataclass(frozen=True)
class Case:
    """A training.

    Args:
        options: Of the optimizer.
        wrapper: Of `DistributedDataParallel`.
        is_inside: Whether the optimizer gets the module inside of the wrapper.
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
        workers: The numbers of workers; without any, every sixteenth case has 4 and the rest 2.
        sharded: Whether `fully_shard` divides the model and each of its layers.
        whole_options: Other options of the one worker with the whole batch; it is then the only
            one to compare with.
    """

    options: dict[str, Any] = field(default_factory=dict)
    wrapper: dict[str, Any] = field(default_factory=dict)
    is_inside: bool = False
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

    @property
    def steps(self) -> int:
        """Fewer where rates are fixed, and nothing is fitted to earlier steps."""
        is_fixed = not self.options.get("adaptive", True) or self.preconditions
        return 2 if is_fixed and not self.options.get("inverse_in_background") else 3


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
        "fixed, sampled, scaler": Case(
            {**FIXED, "mc_samples": 2, "weight_decay": 0.01}, scaler=(64.0, False)
        ),
        "fixed, empirical": Case({**FIXED, "fisher": "empirical", "nesterov": True}, whole=True),
        "fixed, adam": Case({**FIXED, "fallback": "adam", **PERIODS}, model=noisy_net),
        "fixed, ekfac": Case({**FIXED, "inverse": "ekfac"}, sizes=MANY),
        "fixed, decoupled": Case(
            {**FIXED, "max_step_norm": 0.1, "decoupled_weight_decay": True, "weight_decay": 0.1}
        ),
        "automatic": Case({"fisher": "exact"}, whole=True),
        "automatic, reduce": Case({"fisher": "exact", "approximation": "reduce"}, whole=True),
        "automatic, sampled, noise": Case({"weight_decay": 0.01, **PERIODS}, model=noisy_net),
        "automatic, exact inverse": Case({"inverse": "exact", "inverse_in_background": True}),
        "automatic, some examples": Case({"curvature_fraction": 0.5, "factor_fraction": 0.5}),
        "automatic, safeguard, groups": Case({"safeguard": True}, groups=two_groups),
        "automatic, given, decoupled": Case(
            {"damping": 0.1, "momentum": 0.5, "decoupled_weight_decay": True, "weight_decay": 0.1}
        ),
        "uneven, scaler, clipped": Case(sizes=(3, 7, 5, 9), scaler=(64.0, True), clip=0.1),
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
        "automatic, groups, decoupled": Case(
            {"decoupled_weight_decay": True, "weight_decay": 0.05}, groups=two_groups
        ),
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
    "fixed, bounded, scaler": Case(
        {**FIXED, "nesterov": True, "max_step_norm": 0.1, "decoupled_weight_decay": True},
        scaler=(64.0, False),
    ),
    "fixed, some examples, diagonal factors": Case(
        {**FIXED, "factor_fraction": 0.5, "max_factor_size": 20}
    ),
    "fixed, groups": Case(FIXED, groups=two_groups),
    "automatic": Case(workers=BOTH),
    "automatic, exact Fisher": Case({"fisher": "exact", **PERIODS}, whole=True),
    "automatic, exact inverse": Case({"inverse": "exact", "weight_decay": 0.01}),
    "automatic, ekfac": Case({"inverse": "ekfac"}, sizes=MANY),
    "automatic, empirical, reduce": Case({"fisher": "empirical", "approximation": "reduce"}),
    "automatic, some examples": Case({"curvature_fraction": 0.5, "factor_fraction": 0.5}),
    "automatic, safeguard, sum": Case(
        {"safeguard": True}, loss=lambda: nn.CrossEntropyLoss(reduction="sum")
    ),
    "automatic, given, clipped": Case({"damping": 0.1, "momentum": 0.5}, clip=0.1),
    "automatic, noise": Case(model=noisy_net),
    "automatic, groups, scaler": Case(groups=two_groups, scaler=(64.0, False)),
    "uneven, scaler, clipped": Case(sizes=(3, 7, 5, 9), scaler=(64.0, True), clip=0.1),
    "uneven, weighted": Case({"fisher": "exact"}, sizes=(3, 7, 5, 9), weighted=True),
    "inside": Case(is_inside=True),
    "inside, fixed": Case(FIXED, is_inside=True),
    "bucket views": Case(wrapper={"gradient_as_bucket_view": True, "bucket_cap_mb": 1}),
    "unused": Case(wrapper={"find_unused_parameters": True}, model=Branches),
    "unused, empirical, inside": Case(
        {**FIXED, "fisher": "empirical"},
        wrapper={"find_unused_parameters": True},
        is_inside=True,
        model=Branches,
    ),
    # torch fails where the first pass of a static graph is one of `no_sync`
    "static graph": Case(wrapper={"static_graph": True}, sizes=(12, 12), workers=(2,)),
    "static graph, empirical, inside": Case(
        {"fisher": "empirical"},
        wrapper={"static_graph": True},
        is_inside=True,
        sizes=(12, 12),
        workers=(2,),
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


def in_turn(case: Case, index: int) -> Case:
    """A case with its number of workers; of three that are 2, two have a micro-batch for each."""
    workers = case.workers or (4 if index % 16 == 1 else 2,)
    sizes = case.sizes
    if index % 3 and tuple(workers) == (2,) and len(sizes) == PARTS and len(set(sizes)) == 1:
        sizes = (2 * sizes[0],) * 2
    return replace(case, workers=workers, sizes=sizes)


CASES = {name: in_turn(case, index) for index, (name, case) in enumerate(_CASES.items())}


def cases_of(size: int) -> dict[str, Case]:
    """The cases for a number of workers that this version of torch has."""
    own = {name: case for name, case in CASES.items() if size == 1 or size in case.workers}
    return {name: case for name, case in own.items() if DIVIDES_ON_CPU or not case.sharded}
