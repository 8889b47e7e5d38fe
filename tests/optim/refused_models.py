"""Models that are refused since they do not run again alike, and what the message proposes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from refused_scripts import (
    CROSS_ENTROPY,
    Refused,
    X,
    Y,
    net,
    plain,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from einconv_kfac import KFAC


def whole_checkpointed(model: nn.Module, *, use_reentrant: bool) -> Tensor:
    x = X.clone().requires_grad_()
    loss: Tensor = CROSS_ENTROPY(checkpoint(model, x, use_reentrant=use_reentrant), Y)
    loss.backward()
    return loss


def selected() -> Any:
    """Return contexts that keep the results of products of matrices."""
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])


class Checkpointed(nn.Module):
    """A network whose first two layers are computed again in the backward pass."""

    def __init__(self, use_reentrant: bool, **options: Any) -> None:
        super().__init__()
        self.net, self.options = net(), {"use_reentrant": use_reentrant, **options}

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        inner = checkpoint(self.net[:2], x, **self.options)
        return self.net[2](inner)


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


class Reading(nn.Module):
    """An autoencoder that uses the weight of its decoder itself, and returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(5, 4).double(), nn.Linear(4, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        found = functional.linear(self.encoder(x).tanh(), self.decoder.weight)
        return functional.mse_loss(found, x)


def observed(model: nn.Module, opt: KFAC) -> Tensor:
    loss = opt.observe(model(X))
    loss.backward()
    return loss


def of_weights(**options: Any) -> Refused:
    return Refused(
        r"factors of 'decoder' need calls.*uses their weights themselves.*exclude=\['decoder'\]",
        observed,
        observed,
        build=Reading,
        options=options,
        remedied_options={**options, "exclude": ["decoder"]},
        loss_fn=None,
    )


MODELS: dict[str, Refused] = {
    "weights without calls": of_weights(),
    "weights without calls, fixed rates": of_weights(adaptive=False, lr=0.1),
    "a model that overwrites its input": Refused(
        "argument 0 of the model, which was overwritten.*model itself.*inplace=False",
        copied,
        copied,
        build=lambda: Overwriting(True),
        remedied=lambda: Overwriting(False),
    ),
    "a reentrant checkpoint": Refused(
        "Checkpointed layers: pass use_reentrant=False",
        plain,
        plain,
        build=lambda: Checkpointed(True),
        remedied=lambda: Checkpointed(False),
    ),
    "a selective checkpoint": Refused(
        "got selective activation checkpointing.*Leave out `context_fn`",
        plain,
        plain,
        build=lambda: Checkpointed(False, context_fn=selected),
        remedied=lambda: Checkpointed(False),
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
        "must run again.*cannot move a copy of a layer",
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
        "Give `Once` a `jvp`, or a `backward`",
        plain,
        plain,
        build=lambda: net(Custom(Once)),
        remedied=lambda: net(Custom(Twice)),
    ),
}
