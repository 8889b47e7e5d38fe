"""Scripts that are refused: the words, what stays as it was, and the remedy, which trains."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from optim_cases import assert_same, weights
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from einconv_kfac import KFAC

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=GENERATOR, dtype=torch.float64)
Y = (X @ torch.randn(5, 3, generator=GENERATOR, dtype=torch.float64)).argmax(1)
CROSS_ENTROPY = nn.CrossEntropyLoss()
Script = Callable[[nn.Module, KFAC], Tensor]
"""Computes and backpropagates the loss, and returns it."""


def net(*last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), *last).double()


def linear_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).double()


def linear_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3).double()


@dataclass(frozen=True)
class Refused:
    """A script that is refused by a step or by its backward pass.

    Args:
        words: What the message contains.
        script: The script.
        remedy: The remedied script; the good batches of the same optimizer as well, where the
            model is the same.
        build: Makes the model.
        remedied: Makes the model of the remedied script, if another one.
        options: Arguments of the optimizer.
        remedied_options: Those of the remedied script, if others.
        loss_fn: The loss module that the optimizer is given.
    """

    words: str
    script: Script
    remedy: Script
    build: Callable[[], nn.Module] = net
    remedied: Callable[[], nn.Module] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    remedied_options: dict[str, Any] | None = None
    loss_fn: nn.Module | None = CROSS_ENTROPY


def plain(model: nn.Module, _: KFAC) -> Tensor:
    loss: Tensor = CROSS_ENTROPY(model(X), Y)
    loss.backward()
    return loss


def checkpointed_loss(model: nn.Module, opt: KFAC) -> Tensor:
    """Compute the loss in pieces, whose activations are computed again in the backward pass."""

    def piece(scores: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(scores, targets, reduction="sum")

    pairs = zip(model(X).chunk(3), Y.chunk(3))
    loss = sum((checkpoint(piece, *own, use_reentrant=False) for own in pairs), torch.zeros(()))
    opt.observe(loss / len(X)).backward()
    return loss / len(X)


def whole_checkpointed(model: nn.Module, *, use_reentrant: bool) -> Tensor:
    x = X.clone().requires_grad_()
    loss: Tensor = CROSS_ENTROPY(checkpoint(model, x, use_reentrant=use_reentrant), Y)
    loss.backward()
    return loss


def observing(loss: Callable[[Tensor], Tensor]) -> Script:
    """Observe a functional loss of the output."""

    def script(model: nn.Module, opt: KFAC) -> Tensor:
        value = opt.observe(loss(model(X)))
        value.backward()
        return value

    return script


def hinge(o: Tensor) -> Tensor:
    return (1 - o).relu().square().mean()


def clamped_hinge(o: Tensor) -> Tensor:
    return (1 - o).clamp(min=0).square().mean()


def penalty(model: nn.Module, opt: KFAC) -> Tensor:
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    loss = opt.observe(functional.cross_entropy(model(X), Y) + slope.square().mean())
    loss.backward()
    return loss


class Penalized(nn.Module):
    """A network that returns its output and its derivative by the input."""

    def __init__(self, own: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net() if own is None else own

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = self.net(x)
        return y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def inner_penalty(model: nn.Module, opt: KFAC) -> Tensor:
    y, slope = model(X)
    loss = opt.observe(functional.cross_entropy(y, Y) + slope.square().mean())
    loss.backward()
    return loss


def reused_input(model: nn.Module, _: KFAC, *, cloned: bool = False) -> Tensor:
    x = X.clone()
    loss: Tensor = CROSS_ENTROPY(model(x.clone() if cloned else x), Y)
    loss.backward()
    x.zero_()
    return loss


def reused_target(model: nn.Module, _: KFAC, *, cloned: bool = False) -> Tensor:
    y = Y.clone()
    loss: Tensor = CROSS_ENTROPY(model(X), y.clone() if cloned else y)
    loss.backward()
    y.zero_()
    return loss


def reused_observed_target(model: nn.Module, opt: KFAC, *, cloned: bool = False) -> Tensor:
    target = X[:, :3].clone()
    loss = opt.observe(functional.mse_loss(model(X), target.clone() if cloned else target))
    loss.backward()
    target.zero_()
    return loss


def negative(model: nn.Module, _: KFAC) -> Tensor:
    loss: Tensor = -CROSS_ENTROPY(model(X), Y)
    loss.backward()
    return loss


def unobserved(model: nn.Module, _: KFAC) -> Tensor:
    loss = functional.cross_entropy(model(X), Y)
    loss.backward()
    return loss


def functional_gradients(model: nn.Module, _: KFAC) -> Tensor:
    parameters = dict(model.named_parameters())

    def loss(own: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(torch.func.functional_call(model, own, (X,)), Y)

    gradients, value = torch.func.grad_and_value(loss)(parameters)
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].detach()
    return value


class Checkpointed(nn.Module):
    """A network whose first layer is computed again in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.net, self.use_reentrant = net(), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        inner = checkpoint(self.net[0], x, use_reentrant=self.use_reentrant)
        return self.net[2](self.net[1](inner))


class Overwriting(nn.Module):
    """A network that overwrites its input.

    Args:
        inplace: Whether it does.
    """

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first, self.net = nn.LeakyReLU(0.5, inplace=inplace), net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.first(x))


def copied(model: nn.Module, _: KFAC) -> Tensor:
    loss: Tensor = CROSS_ENTROPY(model(X.clone()), Y)
    loss.backward()
    return loss


class Measuring(nn.Module):
    """A network that looks for the number of its outputs.

    Args:
        is_late: Whether it does so in each call.
    """

    def __init__(self, is_late: bool) -> None:
        super().__init__()
        self.net, self.is_late = net(), is_late
        self.size = self.measured()

    def measured(self) -> int:
        found: Tensor = deepcopy(self.net).to("meta")(torch.empty(1, 5, device="meta").double())
        return found.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) / (self.measured() if self.is_late else self.size)


class Counting(nn.Module):
    """A network that depends on the number of its calls.

    Args:
        is_buffer: Whether the number is a buffer.
    """

    def __init__(self, is_buffer: bool) -> None:
        super().__init__()
        self.net, self.is_buffer, self.calls = net(), is_buffer, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        return self.net(x) * (1 + 0.1 * (self.count if self.is_buffer else self.calls))


class Drawing(nn.Module):
    """A network that scales its inner layer by a random number.

    Args:
        own: Whether it comes from a generator of its own.
    """

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.net, self.own = net(), own
        self.state = torch.Generator().manual_seed(1).get_state()

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator()
        generator.set_state(self.state)
        scale = torch.rand((), generator=generator if self.own else None)
        self.state = generator.get_state()
        return self.net(x) * (1 + 0.2 * scale)


class Once(torch.autograd.Function):
    """A square whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradients[0]


class Twice(Once):
    """The same with one that can."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradients[0]


class Custom(nn.Module):
    """A layer of one of these functions."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Named(nn.Module):
    """A network whose input is a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["x"])


def named(model: nn.Module, _: KFAC) -> Tensor:
    loss: Tensor = CROSS_ENTROPY(model({"x": X}), Y)
    loss.backward()
    return loss


def single(model: nn.Module, _: KFAC) -> Tensor:
    loss: Tensor = CROSS_ENTROPY(model(X[0]), Y[0])
    loss.backward()
    return loss


def batch_of_one(model: nn.Module, _: KFAC) -> Tensor:
    loss: Tensor = CROSS_ENTROPY(model(X[0].unsqueeze(0)), Y[:1])
    loss.backward()
    return loss


def two_sizes(model: nn.Module, opt: KFAC) -> Tensor:
    loss = opt.observe(CROSS_ENTROPY(model(X), Y) + model(X[:7]).square().mean())
    loss.backward()
    return loss


def of(script: Any, **given: Any) -> Script:
    return lambda model, opt: script(model, opt, **given)


HALF = {"curvature_fraction": 0.5}
CASES: dict[str, Refused] = {
    "relu before the loss": Refused(
        r"got Relu. Write `x.clamp\(min=0\)`", observing(hinge), observing(clamped_hinge)
    ),
    "largest of each row": Refused(
        r"got Max. Write `x.amax\(dim\)`",
        observing(lambda o: (o - 1).square().max(1).values.mean()),
        observing(lambda o: (o - 1).square().amax(1).mean()),
    ),
    "a derivative in the loop": Refused(
        "got TanhBackward. Compute derivatives of the model in the `forward`",
        penalty,
        inner_penalty,
        remedied=Penalized,
        loss_fn=None,
    ),
    "a derivative in the loop with fixed rates": Refused(
        r"Derivatives of the model must be .*weights of \['0', '2'\].*Pass that module",
        penalty,
        inner_penalty,
        remedied=Penalized,
        loss_fn=None,
        options={"lr": 0.1, "adaptive": False},
    ),
    "a derivative of a linear network in the loop with fixed rates": Refused(
        r"got derivatives of linear layers .*weights of \['0', '1'\].*Pass that module",
        penalty,
        inner_penalty,
        build=linear_net,
        remedied=lambda: Penalized(linear_net()),
        loss_fn=None,
        options={"lr": 0.1, "adaptive": False},
    ),
    "a derivative of one linear layer in the loop with fixed rates": Refused(
        r"got derivatives of linear layers .*weights of \[''\].*Pass that module",
        penalty,
        inner_penalty,
        build=linear_layer,
        remedied=lambda: Penalized(linear_layer()),
        loss_fn=None,
        options={"lr": 0.1, "adaptive": False},
    ),
    "an input that is used again": Refused(
        r"got argument 0 of the model, which was overwritten.*\.clone\(\)",
        reused_input,
        of(reused_input, cloned=True),
    ),
    "a model that overwrites its input": Refused(
        "argument 0 of the model, which was overwritten.*model itself.*inplace=False",
        copied,
        copied,
        build=lambda: Overwriting(True),
        remedied=lambda: Overwriting(False),
    ),
    "a target that is used again": Refused(
        r"got a target of the loss, which was overwritten.*\.clone\(\)",
        reused_target,
        of(reused_target, cloned=True),
    ),
    "a target of an observed loss that is used again": Refused(
        r"which was overwritten.*\.clone\(\)",
        reused_observed_target,
        of(reused_observed_target, cloned=True),
        loss_fn=None,
    ),
    "a negated loss": Refused(
        "negative weight. Write `loss = optimizer.observe",
        negative,
        observing(lambda o: -functional.cross_entropy(o, Y)),
    ),
    "a loss that is not observed": Refused(
        "saw none whose gradient.*`loss = optimizer.observe",
        unobserved,
        observing(lambda o: functional.cross_entropy(o, Y)),
    ),
    "gradients of torch.func": Refused(
        r"before `loss.backward\(\)`; gradients by torch.func.*no recorded loss",
        functional_gradients,
        plain,
    ),
    "a reentrant checkpoint": Refused(
        "Checkpointed layers: pass use_reentrant=False",
        plain,
        plain,
        build=lambda: Checkpointed(True),
        remedied=lambda: Checkpointed(False),
    ),
    "a loss inside of a checkpoint": Refused(
        "must be computed outside of `torch.utils.checkpoint`.*of the output of the model",
        checkpointed_loss,
        plain,
    ),
    "a loss module inside of a checkpoint": Refused(
        "must be computed outside of `torch.utils.checkpoint`",
        checkpointed_loss,
        plain,
        options={"lr": 0.1, "adaptive": False},
    ),
    "a reentrant checkpoint of the whole model": Refused(
        "whose gradient is in `.grad`.*use_reentrant=True",
        lambda model, _: whole_checkpointed(model, use_reentrant=True),
        lambda model, _: whole_checkpointed(model, use_reentrant=False),
    ),
    "a count of calls": Refused(
        "must repeat its output.*state between calls only in buffers",
        plain,
        plain,
        build=lambda: Counting(False),
        remedied=lambda: Counting(True),
    ),
    "a layer that is moved": Refused(
        "must run again.*param must be a Parameter.*cannot move a copy of a layer",
        plain,
        plain,
        build=lambda: Measuring(True),
        remedied=lambda: Measuring(False),
    ),
    "a generator of its own": Refused(
        "must repeat its output.*random numbers from torch's global generator",
        plain,
        plain,
        build=lambda: Drawing(True),
        remedied=lambda: Drawing(False),
    ),
    "a backward pass that cannot be differentiated": Refused(
        "Give the custom `autograd.Function` a `jvp`, or a `backward`",
        plain,
        plain,
        build=lambda: net(Custom(Once)),
        remedied=lambda: net(Custom(Twice)),
    ),
    "half of a batch with batch statistics": Refused(
        r"got '3' \(BatchNorm1d\).*Pass curvature_fraction=1",
        plain,
        plain,
        build=lambda: net(nn.BatchNorm1d(3)),
        options=HALF,
        remedied_options={},
    ),
    "half of a batch in a mapping": Refused(
        "got dict for argument 0 of the model. Pass curvature_fraction=1",
        named,
        named,
        build=Named,
        options=HALF,
        remedied_options={},
    ),
    "one example": Refused(
        r"must be a non-empty batch.*`x.unsqueeze\(0\)`",
        single,
        batch_of_one,
    ),
    "two sizes of batches": Refused(
        "calls of '0' must.*Use approximation='expand'",
        two_sizes,
        two_sizes,
        options={"approximation": "reduce"},
        remedied_options={},
    ),
}


def good(model: nn.Module, opt: KFAC) -> None:
    """A step that is not refused."""
    opt.zero_grad()
    if opt._preconditioner.estimator.loss_fn is None:
        opt.observe(CROSS_ENTROPY(model(X), Y)).backward()
    else:
        CROSS_ENTROPY(model(X), Y).backward()
    opt.step()


@pytest.mark.parametrize("name", CASES)
def test_a_refusal_changes_nothing(name: str) -> None:
    """Neither parameters, state, gradients, nor the next step, where there can be one."""
    case = CASES[name]
    model = case.build()
    opt = KFAC(model, case.loss_fn, **case.options)
    state, before = deepcopy(opt.state_dict()), weights(model)
    gradients: list[Tensor | None] = []

    def refused() -> None:
        case.script(model, opt)
        gradients.extend(None if p.grad is None else p.grad.clone() for p in model.parameters())
        opt.step()

    with pytest.raises((RuntimeError, ValueError), match=case.words):
        refused()
    assert torch.equal(before, weights(model))
    assert_same(state, opt.state_dict())
    if gradients:
        assert_same(gradients, [p.grad for p in model.parameters()])
    else:  # by the backward pass, before it
        assert all(p.grad is None for p in model.parameters())
    if not (case.remedied or case.remedied_options) and "curvature_fraction" not in case.options:
        other = case.build()
        twin = KFAC(other, case.loss_fn, **case.options)
        for _ in range(3):
            good(model, opt)
            good(other, twin)
        assert torch.equal(weights(model), weights(other))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Kronecker factors cover:UserWarning")
def test_the_remedy_trains(name: str) -> None:
    case = CASES[name]
    model = (case.remedied or case.build)()
    options = case.options if case.remedied_options is None else case.remedied_options
    opt, losses = KFAC(model, case.loss_fn, **options), []
    for _ in range(8):
        opt.zero_grad()
        loss = case.remedy(model, opt)
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1 * abs(losses[0])
