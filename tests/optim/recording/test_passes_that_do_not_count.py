"""Passes inside of ``torch.func`` and failed backward passes leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, weights
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy, embedding

from einconv_kfac import KFAC, KFACPreconditioner

Pass = Callable[[nn.Module, nn.Module, Tensor, Tensor], object]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def gradient(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> object:
    return grad(lambda p: loss_fn(functional_call(model, p, (x,)), y))(values(model))


def per_example(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> object:
    def loss(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, p, (a[None],)), b[None])

    return vmap(grad(loss), (None, 0, 0))(values(model), x, y)


def jacobian(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> object:
    return jacrev(lambda p: functional_call(model, p, (x,)))(values(model))


def failed(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> object:
    def fail(_: Tensor) -> None:
        raise MemoryError

    loss = loss_fn(model(3 * x), y)
    handle = next(reversed(list(model.parameters()))).register_hook(fail)
    with pytest.raises(MemoryError):
        loss.backward()
    handle.remove()
    return model.zero_grad()


def nothing(*_: object) -> None:
    """Run no other pass."""


def trained(other: Pass, make: Callable[..., Any], options: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    model, loss_fn, (x, y) = conv_net(), nn.CrossEntropyLoss(), image_batch()
    opt = make(model, loss_fn, fisher="exact", **options)
    for _ in range(3):
        model.zero_grad()
        other(model, loss_fn, x, y)
        loss_fn(model(x), y).backward()
        opt.step()
        if make is KFACPreconditioner:
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * p.grad)  # type: ignore[operator]
    return weights(model)


@pytest.mark.parametrize("other", [gradient, per_example, jacobian, failed])
@pytest.mark.parametrize(
    ("make", "options"),
    [(KFAC, {}), (KFAC, {"lr": 0.1, "adaptive": False}), (KFACPreconditioner, {})],
)
def test_steps_are_those_without_the_pass(
    make: Callable[..., Any], options: dict[str, Any], other: Pass
) -> None:
    torch.testing.assert_close(
        trained(other, make, options), trained(nothing, make, options), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", ["first", "second"])
def test_two_losses_of_one_backward_pass_both_count(name: str) -> None:
    ends = []
    for together in (True, False):
        torch.manual_seed(0)
        model, loss_fn, (x, y) = conv_net(), nn.CrossEntropyLoss(), image_batch()
        opt = KFAC(model, loss_fn, lr=0.1, adaptive=False, fisher="exact")
        first, second = loss_fn(model(x), y), loss_fn(model(2 * x), y)
        if together:
            (first + second).backward()
        else:
            for loss in (first, second) if name == "first" else (second, first):
                loss.backward()
        opt.step()
        ends.append(weights(model))
    torch.testing.assert_close(*ends)


class Words(nn.Module):
    """An embedding by a function whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(embedding(x, self.words.weight, sparse=True))
        return result


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "adaptive": False}])
def test_a_sparse_gradient_of_a_function_is_refused_by_name(options: dict[str, Any]) -> None:
    model, loss_fn = Words(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, fisher="exact", **options)
    loss_fn(model(torch.arange(6)), torch.arange(6) % 3).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"gradient of .words\.weight. must be dense"):
        opt.step()
    assert torch.equal(before, weights(model))
