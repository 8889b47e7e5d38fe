"""Losses among what a model returns: the steps are those of the script that observes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC

EXACT = {"rtol": 1e-9, "atol": 1e-11}
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (24,), generator=GENERATOR)
Loop = Callable[[nn.Module, KFAC], None]


@dataclass
class Output:
    """What a model returns."""

    scores: Tensor
    parts: dict[str, Tensor]


class Net(nn.Module):
    """A network that computes its losses.

    Args:
        returned: Makes what it returns of scores, cross entropy, and a term of the scores.
    """

    def __init__(self, returned: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.returned = nn.Linear(5, 6), nn.Linear(6, 3), returned
        self.scale = nn.Parameter(torch.zeros(()))
        self.double()

    def forward(self, x: Tensor, y: Tensor = Y) -> Any:
        scores = self.last(self.first(x).tanh())
        return self.returned(scores, functional.cross_entropy(scores, y), scores.square().mean())


@cache
def plain(weight: float = 0.0) -> Tensor:
    """Return what a script learns that observes its loss."""
    model = Net(lambda scores, _, __: scores)

    def loop(net: nn.Module, opt: KFAC) -> None:
        scores = net(X)
        loss = functional.cross_entropy(scores, Y) + weight * scores.square().mean()
        opt.observe(loss).backward()

    return trained(model, loop)


def trained(model: nn.Module, loop: Loop, loss_fn: nn.Module | None = None, **own: Any) -> Tensor:
    """Return the parameters after some steps."""
    opt = KFAC(model, loss_fn, fisher="exact", **own)
    for _ in range(3):
        opt.zero_grad()
        loop(model, opt)
        opt.step()
    return weights(model)


RETURNED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "the second of a tuple": (lambda o, c, _: (o, c), lambda r: r[1]),
    "nested": (lambda o, c, t: {"a": [o, {"b": c}]}, lambda r: r["a"][1]["b"]),
    "a data class": (lambda o, c, _: Output(o, {"ce": c}), lambda r: r.parts["ce"]),
    "another number first": (lambda o, c, t: (t.detach(), t, c), lambda r: r[2]),
    "twice": (lambda o, c, t: {"loss": c, "log": c}, lambda r: r["log"]),
    "micro-batches": (lambda o, c, t: (o, c / 2), lambda r: 2 * r[1]),
}


@pytest.mark.parametrize("name", RETURNED)
@pytest.mark.parametrize("observes", [True, False])
def test_one_loss(name: str, observes: bool) -> None:
    returned, loss = RETURNED[name]

    def loop(net: nn.Module, opt: KFAC) -> None:
        own = loss(net(X))
        (opt.observe(own) if observes else own).backward()

    torch.testing.assert_close(trained(Net(returned), loop), plain(), **EXACT)


SUMS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "weights in the loop": (lambda o, c, t: {"c": c, "t": t}, lambda r: r["c"] + 0.3 * r["t"]),
    "after the scores": (lambda o, c, t: (o, c, t), lambda r: r[1] + 0.3 * r[2]),
    "a term of the loss": (lambda o, c, t: (o, c + 0.3 * t, t), lambda r: r[1]),
    "a term before the loss": (lambda o, c, t: (t, o, c + 0.3 * t), lambda r: r[2]),
    "a term in the loss and beside it": (
        lambda o, c, t: (o, c + 0.2 * t, t),
        lambda r: r[1] + 0.1 * r[2],
    ),
    "two terms of a sum": (lambda o, c, t: (c + 0.1 * t, o, c, t), lambda r: r[0] + 0.2 * r[3]),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("observes", [True, False])
def test_several(name: str, observes: bool) -> None:
    returned, loss = SUMS[name]

    def loop(net: nn.Module, opt: KFAC) -> None:
        own = loss(net(X))
        (opt.observe(own) if observes else own).backward()

    torch.testing.assert_close(trained(Net(returned), loop), plain(0.3), **EXACT)


def test_separate_backward_passes() -> None:
    def loop(net: nn.Module, _: KFAC) -> None:
        _, loss, term = net(X)
        loss.backward(retain_graph=True)
        (0.3 * term).backward()

    model = Net(lambda o, c, t: (o, c, t))
    torch.testing.assert_close(trained(model, loop), plain(0.3), **EXACT)


def test_accumulation_over_parts_of_a_batch() -> None:
    def loop(net: nn.Module, _: KFAC) -> None:
        for x, y in zip(X.chunk(2), Y.chunk(2)):
            _, loss = net(x, y)
            (loss / 2).backward()

    torch.testing.assert_close(trained(Net(lambda o, c, _: (o, c)), loop), plain(), **EXACT)


def test_a_number_that_other_outputs_depend_on_is_no_loss() -> None:
    """The temperature is returned, learned or computed, and the loss is observed."""

    class Scaled(Net):
        def forward(self, x: Tensor, y: Tensor = Y) -> Any:
            hidden = self.first(x).tanh()
            scale = self.scale.exp() + hidden.mean()
            return scale, self.scale.exp(), self.last(hidden) * scale

    def loop(index: int) -> Loop:
        def run(net: nn.Module, opt: KFAC) -> None:
            out = net(X)
            scores = out if isinstance(out, Tensor) else out[index]
            opt.observe(functional.cross_entropy(scores, Y)).backward()

        return run

    class Alone(Scaled):
        def forward(self, x: Tensor, y: Tensor = Y) -> Any:
            return super().forward(x, y)[-1]

    found = trained(Scaled(lambda *_: None), loop(2))
    torch.testing.assert_close(found, trained(Alone(lambda *_: None), loop(0)), **EXACT)


def test_a_number_of_parameters_alone_is_no_loss() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, y: Tensor = Y) -> Any:
            return self.last(self.first(x).tanh()), self.scale.exp()

    def loop(net: nn.Module, _: KFAC) -> None:
        scores, scale = net(X)
        functional.cross_entropy(scores * scale, Y).backward()

    with pytest.raises(RuntimeError, match="`step` needs the loss it steps on"):
        trained(Scaled(lambda *_: None), loop)


def test_an_output_that_is_one_number_is_no_loss_beside_a_module() -> None:
    def loop(net: nn.Module, opt: KFAC) -> None:
        opt.observe((net(X)[0] - 1).square()).backward()

    def given(net: nn.Module, _: KFAC) -> None:
        loss_fn(net(X)[0], torch.ones(1, dtype=X.dtype)).backward()

    def own() -> Net:
        return Net(lambda o, _, t: (t[None], o))

    loss_fn = nn.MSELoss()
    torch.testing.assert_close(trained(own(), given, loss_fn), trained(own(), loop), **EXACT)


def test_the_module_that_was_given_is_not_called() -> None:
    def loop(net: nn.Module, _: KFAC) -> None:
        net(X)[1].backward()

    model = Net(lambda o, c, t: (o, c))
    torch.testing.assert_close(trained(model, loop, nn.CrossEntropyLoss()), plain(), **EXACT)


def test_a_number_that_does_not_explain_the_gradient() -> None:
    model = Net(lambda o, c, t: (o, t))
    before = weights(model).clone()

    def loop(net: nn.Module, _: KFAC) -> None:
        scores, term = net(X)
        (functional.cross_entropy(scores, Y) + 1e-3 * term).backward()

    with pytest.raises(RuntimeError, match=r"numbers that the model returned.*observe"):
        trained(model, loop)
    assert torch.equal(weights(model), before)


def test_a_penalty_in_the_loop_is_reported() -> None:
    def loop(net: nn.Module, _: KFAC) -> None:
        penalty = sum(p.square().sum() for p in net.parameters())
        (net(X)[1] + 0.01 * penalty).backward()

    with pytest.warns(RuntimeWarning, match="not explained by the recorded"):
        trained(Net(lambda o, c, t: (o, c)), loop)


def test_fixed_rates() -> None:
    def loop(net: nn.Module, _: KFAC) -> None:
        net(X)[1].backward()

    def observed(net: nn.Module, opt: KFAC) -> None:
        opt.observe(functional.cross_entropy(net(X), Y)).backward()

    fixed = {"adaptive": False, "lr": 0.1}
    found = trained(Net(lambda o, c, t: (o, c)), loop, **fixed)
    expected = trained(Net(lambda o, c, t: o), observed, **fixed)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_scaled_loss() -> None:
    def loop(net: nn.Module, opt: KFAC) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaler.scale(net(X)[1]).backward()
        scaler.unscale_(opt)

    torch.testing.assert_close(trained(Net(lambda o, c, t: (o, c)), loop), plain(), **EXACT)


def codes(scores: Tensor, table: Tensor) -> Tensor:
    return (scores.detach() - table[scores.detach().argmax(1)]).square().mean()


class Codes(Net):
    """A network with a term of a table that no layer's call explains."""

    def __init__(self, term: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(lambda *_: None)
        self.table, self.term = nn.Embedding(3, 3).double(), term

    def forward(self, x: Tensor, y: Tensor = Y) -> Any:
        scores = self.last(self.first(x).tanh())
        return self.term(scores, self.table.weight), scores


TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of a table": codes,
    "of operations that are not known": lambda o, t: o.topk(2).values.square().mean(),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_terms_that_cannot_be_read_are_outputs(name: str) -> None:
    """As the term of a codebook, of weights that are used past the calls of layers."""
    model, losses = Codes(TERMS[name]), []

    def loop(net: nn.Module, opt: KFAC) -> None:
        term, scores = net(X)
        loss = opt.observe(functional.cross_entropy(scores, Y) + 0.1 * term)
        loss.backward()
        losses.append(float(loss.detach()))

    trained(model, loop)
    assert losses[-1] < 0.9 * losses[0]


def test_layers_that_a_returned_number_does_not_depend_on() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor = Y) -> Any:
            hidden = self.first(x).tanh()
            return hidden.square().mean(), self.last(hidden)

    def loop(net: nn.Module, _: KFAC) -> None:
        term, scores = net(X)
        (functional.cross_entropy(scores, Y) + term).backward()

    with pytest.raises(RuntimeError, match=r"not depend on calls of 'last'.*optimizer\.observe"):
        trained(Two(lambda *_: None), loop)
