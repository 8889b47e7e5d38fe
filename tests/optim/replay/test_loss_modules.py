"""Loss modules without a rule of the package, wherever they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC
from einconv_kfac.curvature import EntrywiseRule, register_loss

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (6, 4), generator=GENERATOR)
T = torch.randn(6, 4, 3, generator=GENERATOR, dtype=torch.float64)
EXACT = {"rtol": 1e-8, "atol": 1e-10}


class LogCosh(nn.Module):
    """A loss with a rule that a user registers."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).cosh().log().mean()


class Scripted(torch.autograd.Function):
    """The logarithm of a hyperbolic cosine, which the package cannot see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.cosh().log()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * x.tanh()


class Opaque(LogCosh):
    """The same loss by such a function."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        result: Tensor = Scripted.apply(output - target)  # type: ignore[no-untyped-call]
        return result.mean()


class Rule(EntrywiseRule):
    """The curvature of the loss in closed form, counting its uses."""

    calls = 0

    def _count(self) -> None:
        Rule.calls += 1

    def roots(self, loss: Any, output: Tensor, target: Any, *_: Any) -> Iterator[Tensor]:
        self._count()
        yield ((output - target).cosh().square() * output.numel()).rsqrt()

    def sample(self, loss: Any, output: Tensor, target: Any, generator: Any, *_: Any) -> Tensor:
        self._count()
        (root,) = self.roots(loss, output, target)
        signs = 2 * torch.randint(2, output.shape, generator=generator) - 1
        return root * signs


register_loss(LogCosh, Rule())


class Then(nn.Module):
    """A network and what follows it, as one model."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.net(x))


def same(output: Tensor) -> Tensor:
    return output


def trained(loss_fn: nn.Module, model: nn.Module, loss: Callable[[KFAC, Tensor], Tensor]) -> Tensor:
    opt = KFAC(model, loss_fn, fisher="exact")
    for _ in range(4):
        opt.zero_grad()
        loss(opt, model(X)).backward()
        opt.step()
    return weights(model)


def flat(output: Tensor) -> Tensor:
    return 0.5 * output.reshape(-1, 3)


@pytest.mark.parametrize("kind", [LogCosh, Opaque])
@pytest.mark.parametrize("observed", [False, True])
def test_a_registered_rule_is_used_wherever_the_loss_is_called(
    kind: type[nn.Module], observed: bool
) -> None:
    """On a tensor that follows from the output, as on the output itself."""
    loss_fn, target = kind(), flat(T)
    wanted = trained(loss_fn, Then(flat), lambda _, o: loss_fn(o, target))

    def loss(opt: KFAC, output: Tensor) -> Tensor:
        value: Tensor = loss_fn(flat(output), target)
        return opt.observe(value) if observed else value

    Rule.calls = 0
    found = trained(loss_fn, Then(same), loss)
    assert Rule.calls > 0
    torch.testing.assert_close(found, wanted, **EXACT)


class Squares(nn.Module):
    """The mean squared error by a function that the package cannot see into."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        result: Tensor = Square.apply(output - target)  # type: ignore[no-untyped-call]
        return result.mean()


class Square(torch.autograd.Function):
    """The square of every entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradients[0]


register_loss(Squares, EntrywiseRule())


def test_a_registered_rule_in_a_sum_of_terms() -> None:
    """The steps are those of a loss whose rule the package has."""
    found = []
    for loss_fn in (Squares(), nn.MSELoss()):

        def loss(opt: KFAC, o: Tensor, loss_fn: nn.Module = loss_fn) -> Tensor:
            return opt.observe(2 * loss_fn(flat(o), flat(T)) + functional.mse_loss(o, -T))

        found.append(trained(loss_fn, Then(same), loss))
    torch.testing.assert_close(*found, **EXACT)


@pytest.mark.parametrize("way", [same, flat])
def test_an_observed_loss_counts_once(way: Callable[[Tensor], Tensor]) -> None:
    """Also if the loss module was recorded itself."""
    loss_fn, target, found = nn.MSELoss(), way(T), []
    for observed in (False, True):

        def loss(opt: KFAC, o: Tensor, observed: bool = observed) -> Tensor:
            value: Tensor = loss_fn(way(o), target)
            return opt.observe(value) if observed else value

        found.append(trained(loss_fn, Then(same), loss))
    torch.testing.assert_close(*found, **EXACT)


class Hinge(nn.Module):
    """A squared hinge loss, whose operation does not keep its input."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (1 - output * target.sign()).relu().square().mean()


class Margin(nn.Module):
    """The same by an operation that does."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (1 - output * target.sign()).clamp(min=0).square().mean()


class Hardest(nn.Module):
    """The mean over the largest losses."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = functional.cross_entropy(output.reshape(-1, 3), target.view(-1), reduction="none")
        return losses.topk(12).values.mean()


@pytest.mark.parametrize("way", [same, flat])
def test_a_module_is_called_again_where_its_operations_cannot_be(
    way: Callable[[Tensor], Tensor],
) -> None:
    found = []
    for loss_fn in (Hinge(), Margin()):
        found.append(trained(loss_fn, Then(same), lambda _, o, f=loss_fn: f(way(o), way(T))))
    torch.testing.assert_close(*found, **EXACT)


IN_A_LOOP: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda o: (1 - o * T.sign()).relu().square().mean(),
    "hardest": lambda o: (
        functional.cross_entropy(o.view(-1, 3), Y.view(-1), reduction="none").topk(12).values.mean()
    ),
}


@pytest.mark.parametrize("name", IN_A_LOOP)
def test_losses_whose_operations_keep_no_input_in_a_loop(name: str) -> None:
    inline = IN_A_LOOP[name]
    model, losses = Then(same), []
    opt = KFAC(model)
    for _ in range(6):
        opt.zero_grad()
        loss = opt.observe(inline(model(X)))
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_a_loss_in_the_loop_is_refused_and_as_a_module_it_trains() -> None:
    model, loss_fn, losses = Then(same), Opaque(), []
    opt = KFAC(model)
    before = weights(model)
    opt.observe(Scripted.apply(model(X) - T).mean()).backward()
    with pytest.raises(
        RuntimeError, match=r"autograd.Function Scripted.*[cC]ompute the loss in a module"
    ):
        opt.step()
    assert torch.equal(before, weights(model))
    opt.remove_hooks()
    model.zero_grad()
    opt = KFAC(model, loss_fn)
    for _ in range(6):
        opt.zero_grad()
        loss = loss_fn(model(X), T)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


class Apart(nn.Module):
    """Distances between two outputs."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        distances = (first - second).square().sum(-1).flatten()
        result: Tensor = Scripted.apply(distances).mean()  # type: ignore[no-untyped-call]
        return result


class ApartOfOne(nn.Module):
    """The same of one tensor, which has the outputs one after the other."""

    def forward(self, both: Tensor) -> Tensor:
        value: Tensor = Apart()(*both.chunk(2))
        return value


def test_a_module_of_several_outputs_is_refused_and_of_one_tensor_it_trains() -> None:
    model, loss_fn, losses = Then(same), Apart(), []
    opt = KFAC(model, loss_fn)
    loss_fn(model(X), model(-X)).backward()
    with pytest.raises(RuntimeError, match=r"several outputs as one tensor, by `torch.cat`"):
        opt.step()
    opt.remove_hooks()
    model.zero_grad()
    one = ApartOfOne()
    opt = KFAC(model, one)
    for _ in range(6):
        opt.zero_grad()
        loss = one(torch.cat([model(X), model(-X)]))
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


class Noisy(nn.Module):
    """A loss that draws random numbers; its operation is not known."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        noisy = output + torch.randn_like(output)
        result: Tensor = Scripted.apply(noisy - target).mean()  # type: ignore[no-untyped-call]
        return result


def test_a_loss_module_that_does_not_repeat_its_value_is_refused() -> None:
    model, loss_fn = Then(same), Noisy()
    opt = KFAC(model, loss_fn)
    loss_fn(model(X), T).backward()
    with pytest.raises(RuntimeError, match=r"got autograd.Function Scripted"):
        opt.step()


class Focal(nn.CrossEntropyLoss):
    """A subclass of a loss of torch that computes something else."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = functional.cross_entropy(output, target, reduction="none")
        return ((1 - (-losses).exp()).square() * losses).mean()


def test_a_subclass_that_overrides_its_loss_has_not_its_curvature() -> None:
    loss_fn, flat_targets = Focal(), Y.view(-1)
    found = trained(
        loss_fn, Then(lambda o: o.reshape(-1, 3)), lambda _, o: loss_fn(o, flat_targets)
    )
    inline = Focal.forward
    wanted = trained(
        nn.CrossEntropyLoss(),
        Then(lambda o: o.reshape(-1, 3)),
        lambda opt, o: opt.observe(inline(loss_fn, o, flat_targets)),
    )
    torch.testing.assert_close(found, wanted, **EXACT)
