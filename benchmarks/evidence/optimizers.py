"""The compared optimizers, each built from a setting of its hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from math import cos, pi
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.optim import KFAC
from evidence.task import Task

Setting = Mapping[str, Any]
PERIODS = (10, 100)
"""Steps between two updates of the factors, and of the inverses, of every K-FAC."""
REST_LR = 2e-3
"""Learning rate of AdamW for the layers that a peer leaves untrained or unpreconditioned."""
_INSTALL = {
    "pytorch_optimizer": "pip install pytorch-optimizer",
    "singd": "pip install singd",
    "asdl": "pip install --no-deps asdfghjkl",
}


@dataclass
class Trainer:
    """The optimizers of one network, and its backward pass.

    Args:
        optimizers: The optimizers; together they train every parameter.
        backward: Computes the loss of a batch, backpropagates and returns it.
        scheduled: Whether the learning rates follow the schedule.
    """

    optimizers: list[torch.optim.Optimizer]
    backward: Callable[[Tensor, Tensor], Tensor]
    scheduled: bool = True

    def __post_init__(self) -> None:
        """Store the peak learning rates."""
        self._peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]

    def step(self, x: Tensor, y: Tensor, fraction: float) -> Tensor:
        """Train on a batch at ``fraction`` of the learning rates, and return the loss."""
        for optimizer, peaks in zip(self.optimizers, self._peaks):
            optimizer.zero_grad()
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * fraction if self.scheduled else peak
        loss = self.backward(x, y)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()


def schedule(step: int, steps: int) -> float:
    """Return the fraction of the peak rate: a linear warm-up over 5 %, then a cosine to zero."""
    warm_up = max(steps // 20, 1)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + cos(pi * (step - warm_up) / max(steps - warm_up, 1))) / 2


def library(name: str) -> ModuleType:
    """Import a peer's package.

    Raises:
        ImportError: If it is not installed, with the command that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"This optimizer needs {package}: {_INSTALL[package]}") from error


def torch_trainer(
    optimizers: list[torch.optim.Optimizer], model: nn.Module, loss_fn: nn.Module, task: Task
) -> Trainer:
    """Return a trainer that backpropagates by torch."""

    def backward(x: Tensor, y: Tensor) -> Tensor:
        loss = task.family.loss(loss_fn, model(x), x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return Trainer(optimizers, backward)


def sgd(model: nn.Module, task: Task, setting: Setting) -> Trainer:
    """SGD with Nesterov momentum 0.9."""
    opt = torch.optim.SGD(model.parameters(), lr=setting["lr"], momentum=0.9, nesterov=True)
    return torch_trainer([opt], model, task.family.loss_fn(), task)


def adamw(model: nn.Module, task: Task, setting: Setting) -> Trainer:
    """AdamW with weight decay 0.01."""
    opt = torch.optim.AdamW(model.parameters(), lr=setting["lr"], weight_decay=0.01)
    return torch_trainer([opt], model, task.family.loss_fn(), task)


def soap(model: nn.Module, task: Task, setting: Setting) -> Trainer:
    """SOAP of pytorch_optimizer, with preconditioners updated every 10 steps."""
    opt = library("pytorch_optimizer").SOAP(
        model.parameters(), lr=setting["lr"], precondition_frequency=PERIODS[0]
    )
    return torch_trainer([opt], model, task.family.loss_fn(), task)


def muon(model: nn.Module, task: Task, setting: Setting) -> Trainer:
    """Muon of pytorch_optimizer for inner matrices, and AdamW for the rest, at the same rate.

    Updates of matrices have the root mean square of AdamW's (Liu et al., 2025), so that one rate
    serves both. Vectors, the last matrix, and parameters of embeddings are the rest.
    """
    leaves = [m for m in model.modules() if not [*m.children()] and not isinstance(m, nn.Embedding)]
    matrices = [p for m in leaves for p in m.parameters() if p.ndim >= 2][:-1]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [
        {"params": matrices, "use_muon": True},
        {"params": rest, "use_muon": False, "betas": (0.9, 0.999), "weight_decay": 0.01},
    ]
    common = {"lr": setting["lr"], "weight_decay": 0.01}
    groups = [{**common, **group} for group in groups if group["params"]]
    opt = library("pytorch_optimizer").Muon(groups, use_adjusted_lr=True)
    return torch_trainer([opt], model, task.family.loss_fn(), task)


def singd(model: nn.Module, task: Task, setting: Setting) -> Trainer:
    """SINGD with dense structures, and AdamW for the layers that it does not train."""
    opt = library("singd.optim.optimizer").SINGD(
        model,
        lr=setting["lr"],
        damping=setting["damping"],
        T=PERIODS[0],
        normalize_lr_cov=True,
        lr_cov=0.1,
        warn_unsupported=False,
    )
    return torch_trainer(with_rest(model, opt), model, task.family.loss_fn(), task)


def with_rest(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return an optimizer, and AdamW for the parameters that the optimizer lacks."""
    own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    rest = [parameter for parameter in model.parameters() if parameter not in own]
    return [optimizer, torch.optim.AdamW(rest, lr=REST_LR)] if rest else [optimizer]


class _AsdlLoss(nn.Module):
    """A task's loss with the ``reduction`` that asdl sets: over examples, or their sum."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.reduction = "mean"

    def forward(self, output: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of inputs ``x`` with targets ``y``."""
        family = self.task.family
        loss = family.loss(family.loss_fn(), output, x, y)
        return loss if self.reduction == "mean" else loss * len(x)


def _asdl_maker(
    model: nn.Module, task: Task, damping: float, periods: tuple[int, int], warm_up: int
) -> Any:
    """Return asdl's K-FAC: Monte-Carlo Fisher for classes, else the empirical one."""
    asdl = library("asdl")
    if not torch.cuda.is_available():  # its markers for NVIDIA's profiler need CUDA
        marked = import_module("asdl.precondition.natural_gradient")
        vars(marked)["nvtx"] = SimpleNamespace(range=nullcontext)
    config = asdl.PreconditioningConfig(
        data_size=task.batch_size,
        damping=damping,
        ema_decay=0.05,
        preconditioner_upd_interval=periods[1],
        preconditioner_warmup_steps=warm_up,
        curvature_upd_interval=periods[0],
        curvature_warmup_steps=warm_up,
        ignore_modules=[nn.ConvTranspose2d],
    )
    has_classes = isinstance(task.family.loss_fn(), nn.CrossEntropyLoss)
    fisher = asdl.FISHER_MC if has_classes else asdl.FISHER_EMP
    return asdl.KfacGradientMaker(model, config, fisher_type=fisher)


def asdl_trainer(
    model: nn.Module,
    task: Task,
    constants: tuple[float, float],
    periods: tuple[int, int],
    warm_up: int,
) -> Trainer:
    """Return asdl's K-FAC in front of SGD with momentum 0.9, its steps clipped to norm 1.

    AdamW trains transposed convolutions, which asdl does not support.

    Args:
        model: The network.
        task: The task.
        constants: Learning rate and damping.
        periods: Steps between two updates of factors and of inverses.
        warm_up: First steps, each of which updates factors and inverses.
    """
    maker = _asdl_maker(model, task, constants[1], periods, warm_up)
    loss_fn = _AsdlLoss(task)
    foreign = {
        p for m in model.modules() if isinstance(m, nn.ConvTranspose2d) for p in m.parameters()
    }
    own = [p for p in model.parameters() if p not in foreign]
    opt = torch.optim.SGD(own, lr=constants[0], momentum=0.9)

    def backward(x: Tensor, y: Tensor) -> Tensor:
        output = maker.setup_model_call(model, x)
        maker.setup_loss_call(loss_fn, output, x, y)
        loss: Tensor = maker.forward_and_backward()[1]
        nn.utils.clip_grad_norm_(own, 1.0)
        return loss

    return Trainer(with_rest(model, opt), backward)


def asdl_kfac(model: nn.Module, task: Task, setting: Setting) -> Trainer:
    """K-FAC of asdl, with inverses updated as often as factors, as in its authors' experiments."""
    factors = PERIODS[0]
    constants = (setting["lr"], setting["damping"])
    return asdl_trainer(model, task, constants, (factors, factors), warm_up=factors)


def kfac_fixed(model: nn.Module, task: Task, setting: Setting) -> Trainer:
    """KFAC with fixed rates."""
    loss_fn = task.family.loss_fn()
    opt = KFAC(model, loss_fn, adaptive=False, **setting)
    return torch_trainer([opt], model, loss_fn, task)


def kfac(model: nn.Module, task: Task, setting: Setting) -> Trainer:
    """KFAC with the automatic step, on its defaults except for the setting."""
    loss_fn, changes = task.family.loss_fn(), dict(setting)
    scheduled = bool(changes.pop("scheduled", False))
    opt = KFAC(model, loss_fn, **changes)
    return replace(torch_trainer([opt], model, loss_fn, task), scheduled=scheduled)


OPTIMIZERS: dict[str, Callable[[nn.Module, Task, Setting], Trainer]] = {
    "SGD": sgd,
    "AdamW": adamw,
    "SOAP": soap,
    "Muon": muon,
    "SINGD": singd,
    "asdl K-FAC": asdl_kfac,
    "KFAC fixed": kfac_fixed,
    "KFAC": kfac,
    "KFAC tuned": kfac,
}
PEERS = ("SGD", "AdamW", "SOAP", "Muon", "SINGD", "asdl K-FAC")
"""The tuned optimizers that KFAC is compared with."""
