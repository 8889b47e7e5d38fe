"""Small models and batches for the optimizer's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.step.objective import Objective

Batch = tuple[Tensor, Tensor]
LATE = 10_000
"""Steps after which no period is shortened any more."""


def conv_net(seed: int = 0, *, random_layers: bool = False) -> nn.Sequential:
    """Return a network for ``[n, 1, 6, 6]``: strided, grouped and linear layers.

    The random layers come with one, ``6``, that no Kronecker factor covers.
    """
    torch.manual_seed(seed)
    extra = [nn.BatchNorm2d(4), nn.Dropout(0.3)] if random_layers else []
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        *extra,
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        *([nn.PReLU(4)] if random_layers else []),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).double()


def image_batch(size: int = 12, seed: int = 0) -> Batch:
    """Return random images with random classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def train_step(model: nn.Module, loss_fn: nn.Module, opt: torch.optim.Optimizer, b: Batch) -> float:
    """Take one step on a batch and return the loss before it."""
    opt.zero_grad()
    loss = loss_fn(model(b[0]), b[1])
    loss.backward()
    opt.step()
    return float(loss.detach())


def weights(model: nn.Module) -> Tensor:
    """Return all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def objective_of(parameters: dict[str, Tensor], **others: Any) -> Objective:
    """Return an objective at parameters; by default without a gradient, batches or decay."""
    given: dict[str, Any] = {
        "gradient": {name: torch.zeros_like(p) for name, p in parameters.items()},
        "decay": dict.fromkeys(parameters, 0.0),
        "rates": dict.fromkeys(parameters, 1.0),
        "settings": Hyperparameters(),
        "by_parameter": dict.fromkeys(parameters, Hyperparameters()),
        "batches": [],
        "others": {},
        "memory": {name: {} for name in parameters},
    }
    return Objective(parameters, **{**given, **others})


def late_training(**options: Any) -> tuple[nn.Module, nn.Module, KFAC]:
    """Return a network and an optimizer that has counted many steps, and taken none."""
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    state = opt.state_dict()
    state["kfac"]["preconditioner"]["steps"] = LATE
    opt.load_state_dict(state)
    return model, loss_fn, opt


def with_kl_clip(options: dict[str, Any], bound: float | None) -> dict[str, Any]:
    """Return a mode's options, with a bound where rates are fixed."""
    return options if options.get("adaptive", True) else {**options, "kl_clip": bound}


def assert_same(a: Any, b: Any) -> None:
    """Compare nested containers of tensors bit by bit; a number that is not one equals itself."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b):
            assert_same(left, right)
    else:
        assert a == b or (a != a and b != b)  # not a number, as a value that is not known yet
