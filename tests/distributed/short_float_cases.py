"""Trainings whose factors are sent in a data type of fewer bits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from optim_cases import conv_net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree
from worker_cases import FIXED, MANY, Case
from worker_training import Training, all_weights

from einconv_kfac import KFAC

DTYPES = torch.float16, torch.bfloat16, torch.float32
SCALE = 1e4
"""Of inputs; its square is beyond the range of float16."""
STEPS = 2
TRAININGS: dict[str, dict[str, Any]] = {
    "fixed": {**FIXED, "communication_dtype": torch.float16},
    "fixed, divided": {**FIXED, "communication_dtype": torch.bfloat16, "divide_factors": True},
    "automatic": {"communication_dtype": torch.bfloat16},
    "automatic, divided": {"communication_dtype": torch.float16, "divide_factors": True},
}
Found = dict[str, Any]


def factors_of(opt: Any) -> list[Tensor]:
    """The factors of all layers, as dense matrices."""
    layers = opt.state_dict()["kfac"]["preconditioner"]["layers"]
    return [factor for name in sorted(layers) for factor in layers[name]["factors"]]


class Times(nn.Module):
    """Multiplies by `SCALE`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        return SCALE * x


def scaled_net() -> nn.Module:
    """A network whose first layer has large inputs and small weights."""
    first, *others = conv_net()
    with torch.no_grad():
        first.weight.div_(SCALE)
    return nn.Sequential(Times(), first, *others)


def first_factors(options: dict[str, Any], rank: int, size: int) -> list[Tensor]:
    """The factors after the first step."""
    training = Training(Case({**FIXED, "fisher": "exact", **options}, model=scaled_net), rank, size)
    training.step(0)
    return factors_of(training.opt)


def squares(options: dict[str, Any], rank: int, size: int) -> Tensor:
    """Sums of squared gradients in an eigenbasis, which no basis changes, after two steps."""
    given = {"inverse": "ekfac", "fisher": "exact", "lr": 1e-12, "damping": 1e-3, **options}
    training = Training(Case({**FIXED, **given}, sizes=MANY), rank, size)
    for number in range(2):
        training.step(number)
    layers = training.opt._preconditioner.layers
    found = [layers[name].inverse.state_dict()["values"].sum() for name in sorted(layers)]
    return torch.stack(found)


def numbers_of(training: Training) -> Tensor:
    """Parameters, factors, inverses and other tensors of the state; zero where not yet known."""
    leaves = _pytree.tree_leaves(training.opt.state_dict())
    tensors = [leaf.double().flatten() for leaf in leaves if isinstance(leaf, Tensor)]
    return torch.cat([*tensors, all_weights(training.module)]).nan_to_num()


def numbers_after(options: dict[str, Any], rank: int, size: int) -> Found:
    """All numbers of the state after some steps, and what a copy and a loaded state go on with."""
    training = Training(Case(options, sizes=MANY), rank, size)
    for number in range(STEPS):
        training.step(number)
    found = {"state": numbers_of(training)}
    again = Training(Case(options, sizes=MANY), rank, size)
    again.step(0)
    again.module.load_state_dict(training.module.state_dict())
    again.opt.load_state_dict(copy.deepcopy(training.opt.state_dict()))
    for own in (training, again):
        own.step(STEPS)
    return {**found, "whole": numbers_of(training), "loaded": numbers_of(again)}


def differing(rank: int) -> str:
    """The error where workers would send other data types."""
    dtype = torch.float16 if rank else torch.bfloat16
    model = nn.Sequential(nn.Linear(2, 2))
    try:
        KFAC(DistributedDataParallel(model), nn.CrossEntropyLoss(), communication_dtype=dtype)
    except RuntimeError as error:
        return str(error)
    return ""


def short(rank: int, size: int) -> Found:
    """What a worker finds, by case."""
    warnings.simplefilter("ignore")
    found: Found = {}
    if size > 1:
        found = {name: numbers_after(own, rank, size) for name, own in TRAININGS.items()}
        found["differing"] = differing(rank)
    for dtype in (None, *DTYPES):
        for divides in (False, True):
            options = {"communication_dtype": dtype, "divide_factors": divides}
            found[f"factors, {dtype}, {divides}"] = first_factors(options, rank, size)
            found[f"squares, {dtype}, {divides}"] = squares(options, rank, size)
    return found
