"""Layers of modules that share a weight, a bias, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ggn import dense_empirical, dense_ggn
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner
from einconv_kfac.curvature import coverage, find_layers, kronecker_factors

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}
TOKENS = torch.tensor([[0, 3, 1], [2, 2, 0], [4, 1, 1], [5, 0, 2]])


class Language(nn.Module):
    """Scores of the next token, ``[n, v, s]``; the head is the first or the second module."""

    def __init__(self, tied: bool = True, head_first: bool = False, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = {"emb": nn.Embedding(6, 4), "mid": nn.Linear(4, 4), "head": nn.Linear(4, 6, bias)}
        for name in reversed(layers) if head_first else layers:
            self.add_module(name, layers[name])
        if tied:
            self.head.weight = self.emb.weight
        else:
            self.head.load_state_dict({"weight": self.emb.weight}, strict=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.mid(self.emb(tokens)).cumsum(1))
        return self.head(hidden).transpose(1, 2)


class Twice(nn.Module):
    """Two linear layers, of which some parameters are one."""

    def __init__(self, *shared: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))
        for name in shared:
            setattr(self.b, name, getattr(self.a, name))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Unknown(nn.Module):
    """A module without a rule."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T)


class Mixed(nn.Module):
    """A weight that a linear layer and a module without a rule use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b = Unknown(self.a.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.tanh(self.a(x))))


class Autoencoder(nn.Module):
    """A convolution and its transpose, of one weight, which they cut into other matrices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv1d(1, 3, 2), nn.ConvTranspose1d(3, 1, 2), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.tanh(self.a(x[:, None])))[:, 0])


X, Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(5) % 3


def partial_traces(matrix: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The partial traces of ``[(co d), (co d)]`` over ``d`` and over ``co``."""
    parts = matrix.reshape(rows, len(matrix) // rows, rows, -1)
    return torch.einsum("adbd->ab", parts), torch.einsum("adae->de", parts)


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "forward-only"])
def test_a_tied_embedding_has_the_partial_traces_of_both_uses(
    fisher: Any, approximation: Any, head_first: bool
) -> None:
    options: dict[str, Any] = {"fisher": fisher, "approximation": approximation}
    untied, tied = (Language(flag, head_first).double() for flag in (False, True))
    data, loss_fn = [(TOKENS[:1], TOKENS[:1]), (TOKENS[1:], TOKENS[1:])], nn.CrossEntropyLoss()
    apart = kronecker_factors(untied, loss_fn, data, **options)
    found = kronecker_factors(tied, loss_fn, data, **options)
    name, other = ("head", "emb") if head_first else ("emb", "head")
    assert list(found) == ([name, "mid"])
    block = found[name]
    assert block.parameters == (f"{name}.weight",)
    _, rows, columns = block.layout.shape
    order = torch.arange(rows * columns).reshape(columns, rows).mT.flatten()
    transposed = apart[other].to_dense()[0][order][:, order]
    total = apart[name].to_dense()[0] + transposed
    got = block.to_dense()[0]
    torch.testing.assert_close(got.trace(), total.trace(), **TOLERANCE)
    for ours, expected in zip(partial_traces(got, rows), partial_traces(total, rows)):
        torch.testing.assert_close(ours, expected, **TOLERANCE)
    torch.testing.assert_close(found["mid"].to_dense(), apart["mid"].to_dense(), **TOLERANCE)


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("size", [8192, 5, 1])
def test_squared_gradients_of_a_tied_embedding(fisher: Any, head_first: bool, size: int) -> None:
    """The diagonal is exact, and that in the eigenbasis has its trace."""
    model, loss_fn = Language(head_first=head_first).double(), nn.CrossEntropyLoss(reduction="sum")
    oracle = dense_ggn if fisher == "exact" else dense_empirical
    name = "head" if head_first else "emb"
    (exact,) = oracle(model, loss_fn, TOKENS, TOKENS, name)
    data = [(TOKENS[:1], TOKENS[:1]), (TOKENS[1:], TOKENS[1:])]
    for kind in ("diagonal", "ekfac"):
        block = kronecker_factors(
            model, loss_fn, data, kind=kind, fisher=fisher, max_factor_size=size
        )[name]
        sides = zip((block.basis_b, block.basis_a), block.layout.shape[1:])
        bases = [torch.eye(n).double() if u is None else u[0].contiguous() for u, n in sides]
        basis = torch.kron(*bases)
        expected = (basis.T @ exact @ basis).diagonal()
        torch.testing.assert_close(block.values.flatten(), expected, **TOLERANCE)


@pytest.mark.parametrize("shared", [("weight",), ("bias",)], ids=str)
def test_linear_layers_that_share_a_part_have_blocks_of_their_weights(shared: tuple[str]) -> None:
    model, loss_fn = Twice(*shared).double(), nn.CrossEntropyLoss()
    rows = {row.parameter: row for row in coverage(model)}
    gaps = [row.parameter for row in coverage(model).gaps()]
    assert gaps == (["a.bias", "b.bias"] if shared == ("weight",) else ["a.bias"])
    why = "shares the weight, but not" if shared == ("weight",) else "which has another weight"
    assert all(why in rows[name].reason for name in gaps)
    found = kronecker_factors(model, loss_fn, [(X, Y)], kind="diagonal", fisher="exact")
    for name, block in found.items():
        if name == "c":
            continue
        assert block.parameters == (f"{name}.weight",)
        weight = f"{name}.weight"
        scores, present = _scores(model, weight), model.get_parameter(weight).detach()
        slopes = torch.autograd.functional.jacobian(scores, present)
        p = model(X).softmax(-1).detach()
        hessian = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(X)
        expected = torch.einsum("ncab,nck,nkab->ab", slopes, hessian, slopes)
        torch.testing.assert_close(block.values[0], expected, **TOLERANCE)


def _scores(model: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """The scores as a function of a parameter that several modules may share."""

    def scores(weight: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, {name: weight}, X)
        return result

    return scores


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Mixed, "shared with 'b', whose use of it no rule covers"),
        (Autoencoder, r"'a' (Conv1d) and 'b' (ConvTranspose1d) share it but use it as different"),
    ],
)
def test_what_has_no_single_block_is_left_to_the_fallback(
    build: Callable[[], nn.Module], reason: str
) -> None:
    model, loss_fn = build().double(), nn.CrossEntropyLoss()
    rows = {row.parameter: row for row in coverage(model)}
    assert rows["a.weight"].layer is None
    assert reason in rows["a.weight"].reason
    assert list(kronecker_factors(model, loss_fn, [(X, Y)])) == ["c"]
    assert [layer.name for layer in find_layers(model)] == ["c"]
    opt = KFAC(model, loss_fn, lr=0.1, adaptive=False)
    kinds = opt.coverage()
    assert (kinds["a.weight"], kinds["c.weight"]) == ("gradient", "kfac")
    losses = []
    for _ in range(5):
        opt.zero_grad()
        loss = loss_fn(model(X), Y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"strict.*'a.weight' \(Conv1d|strict.*'a.weight' \(Lin"):
        KFAC(model, loss_fn, strict=True)


def test_all_of_a_shared_weight_is_excluded() -> None:
    model, loss_fn = Language().double(), nn.CrossEntropyLoss()
    for exclude in ("emb", "head", [model.head], nn.Embedding, [nn.Embedding, "head"]):
        found = kronecker_factors(model, loss_fn, [(TOKENS, TOKENS)], exclude=exclude)
        assert list(found) == ["mid"]
        opt = KFAC(model, loss_fn, exclude=exclude)
        assert opt.coverage()["emb.weight"] == "adam"
        opt.remove_hooks()
        assert KFACPreconditioner(model, loss_fn, exclude=exclude).covered() == {
            "mid.weight",
            "mid.bias",
        }
    chosen = kronecker_factors(model, loss_fn, [(TOKENS, TOKENS)], parameters=["emb.weight"])
    assert list(chosen) == ["emb"]


def test_a_head_with_a_bias_is_tied_by_its_weight() -> None:
    """As in BERT, whose prediction head holds the bias under a second name."""
    model = Language(bias=True).double()
    model.bias = model.head.bias
    assert [row.parameter for row in coverage(model).gaps()] == ["bias"]
    found = kronecker_factors(model, nn.CrossEntropyLoss(), [(TOKENS, TOKENS)], fisher="exact")
    assert found["emb"].parameters == ("emb.weight",)


def test_a_parameter_with_a_second_name_stays_covered() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model.weight_of_the_first = model[0].weight
    model.listed = nn.ParameterList([model[2].weight])
    names = [name for layer in find_layers(model) for name in layer.parameters]
    assert names == ["weight_of_the_first", "0.bias", "2.weight", "2.bias"]
