"""KFAC on embeddings: as on linear layers of one-hot inputs, and tied to an output layer."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC, KFACPreconditioner

VOCABULARY, LENGTH = 11, 5
KINDS = ["factored", "exact", "ekfac"]
MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False, "momentum": 0.9}]
IDS = ["auto", "fixed"]
LOSS = nn.CrossEntropyLoss()


class OneHot(nn.Module):
    """The linear layer that an embedding is."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.linear = nn.Linear(*embedding.weight.shape, bias=False)
        self.linear.weight.data = embedding.weight.data.mT.clone()

    def forward(self, tokens: Tensor) -> Tensor:
        a = functional.one_hot(tokens, self.linear.in_features)
        result: Tensor = self.linear(a.to(self.linear.weight.dtype))
        return result


class GPT(nn.Module):
    """Scores of the next token, ``[n, v, s]``."""

    def __init__(self, tied: bool = False, vocabulary: int = VOCABULARY, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(LENGTH, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        hidden = self.wte(tokens) + self.wpe(positions)
        hidden = hidden + self.down(torch.tanh(self.up(self.norm(hidden))))
        scale = torch.arange(1, 1 + tokens.shape[1])[None, :, None]
        result: Tensor = self.head(hidden.cumsum(1) / scale)
        return result.transpose(1, 2)


def batch(size: int = 12, seen: int = VOCABULARY, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(seen, (size, LENGTH), generator=generator)
    return x, (3 * x + 1) % seen


def train(
    model: nn.Module, opt: Any, steps: int, loss_fn: nn.Module = LOSS, **of: Any
) -> list[float]:
    losses = []
    for step in range(steps):
        x, y = batch(seed=step, **of)
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


ONE_HOT = [
    (("expand", "reduce")[(i + j) % 2], inverse, mode)
    for i, inverse in enumerate(KINDS)
    for j, mode in enumerate(MODES)
]
"""Any two of approximation, inverse and mode meet."""


@pytest.mark.parametrize(("approximation", "inverse", "mode"), ONE_HOT)
def test_an_embedding_is_a_linear_layer_of_one_hot_inputs(
    approximation: Any, inverse: str, mode: dict[str, Any]
) -> None:
    """Four of eleven tokens never occur.

    All examples have the same positions: with ``"reduce"`` the ``A`` of their embedding has rank
    one, so that its eigenvectors, and with them EKFAC, are not determined.
    """
    model = GPT().double()
    exclude = ["wpe*"] if (approximation, inverse) == ("reduce", "ekfac") else []
    other = copy.deepcopy(model)
    other.wte, other.wpe = OneHot(model.wte), OneHot(model.wpe)
    losses = []
    for own in (model, other.double()):
        opt = KFAC(
            own,
            LOSS,
            inverse=inverse,
            approximation=approximation,
            weight_decay=1e-3,
            exclude=exclude,
            **mode,
        )
        assert set(opt.coverage().values()) <= {"kfac", opt._fallback.kind}
        losses.append(train(own, opt, 4, seen=7))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-8)
    for name in ("wte", "wpe"):
        embedding, linear = model.get_submodule(name), other.get_submodule(f"{name}.linear")
        torch.testing.assert_close(embedding.weight, linear.weight.mT, rtol=1e-5, atol=1e-7)


OPTIONS: list[dict[str, Any]] = [{}, {"max_factor_size": 9}, {"approximation": "reduce"}]
TRAININGS = [
    (inverse, MODES[(i + j) // 2 % 2], (i + j) % 2 == 1, options)
    for i, inverse in enumerate(KINDS)
    for j, options in enumerate(OPTIONS)
]
"""Any two of inverse, mode, tying and options in all combinations."""


@pytest.mark.parametrize(("inverse", "mode", "tied", "options"), TRAININGS)
def test_language_models_train_and_resume(
    inverse: str, mode: dict[str, Any], tied: bool, options: dict[str, Any]
) -> None:
    model = GPT(tied).double()
    opt = KFAC(model, LOSS, inverse=inverse, inverse_update_period=2, **mode, **options)
    covered = {name for name, kind in opt.coverage().items() if kind == "kfac"}
    assert covered >= {"wte.weight", "wpe.weight", "up.weight"}
    losses = train(model, opt, 4)
    assert losses[-1] < losses[0]
    stream = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), stream)
    stream.seek(0)
    weights, state = torch.load(stream, weights_only=True)
    again = GPT(tied).double()
    again.load_state_dict(weights)
    resumed = KFAC(again, LOSS, inverse=inverse, inverse_update_period=2, **mode, **options)
    resumed.load_state_dict(state)
    torch.testing.assert_close(train(again, resumed, 2), train(model, opt, 2))
    copied, optimizer, loss_fn = copy.deepcopy((again, resumed, LOSS))
    torch.testing.assert_close(train(copied, optimizer, 2, loss_fn), train(again, resumed, 2))
    for name, numbers in opt.layer_statistics().items():
        assert numbers["condition_a"] >= 1, name
        assert numbers["condition_b"] >= 1, name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("inverse", KINDS)
def test_groups_background_and_fractions(inverse: str, tied: bool) -> None:
    model = GPT(tied).double()
    embeddings = [model.wte.weight, model.wpe.weight]
    known = {id(p) for p in embeddings}
    opt = KFAC(
        model,
        LOSS,
        lr=0.05,
        adaptive=False,
        inverse=inverse,
        inverse_in_background=True,
        inverse_update_period=2,
        factor_fraction=0.5,
        params=[
            {"params": embeddings, "damping": 0.5, "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if id(p) not in known]},
        ],
    )
    losses = train(model, opt, 6)
    assert losses[-1] < losses[0]
    dampings = {name: own["damping"] for name, own in opt.layer_statistics().items()}
    assert dampings["wte"] == dampings["wpe"] == pytest.approx(0.51)
    assert dampings["up"] == pytest.approx(0.03)


@pytest.mark.parametrize("inverse", KINDS)
def test_rows_of_tokens_that_never_occur_stay(inverse: str) -> None:
    model = GPT().double()
    before = model.wte.weight.detach().clone()
    preconditioner = KFACPreconditioner(model, LOSS, inverse=inverse)
    x, y = batch(seen=7)
    LOSS(model(x), y).backward()
    preconditioner.step()
    gradient = model.wte.weight.grad
    assert gradient is not None
    assert bool(gradient[:7].any(1).all())
    assert not gradient[7:].any()
    opt = KFAC(model, LOSS, inverse=inverse)
    train(model, opt, 3, seen=7)
    assert torch.equal(model.wte.weight[7:].detach(), before[7:])


def test_a_state_with_another_largest_size_is_refused() -> None:
    model = GPT().double()
    opt, other = (KFAC(model, LOSS, max_factor_size=size) for size in (8192, 9))
    other.remove_hooks()
    train(model, opt, 1)
    with pytest.raises(ValueError, match=r"factors of shape .* for 'up'.*`max_factor_size`"):
        other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize(
    ("inverse", "mode"), [*zip(KINDS, (MODES[0], MODES[1], MODES[0])), (KINDS[0], MODES[1])]
)
def test_the_vocabulary_of_a_language_model(inverse: str, mode: dict[str, Any]) -> None:
    """A dense factor of it would take 10 GB."""
    model = GPT(tied=True, vocabulary=50257, width=4)
    opt = KFAC(model, LOSS, inverse=inverse, **mode)
    losses = train(model, opt, 2, size=2, seen=50257)
    assert all(torch.tensor(losses).isfinite())
    state = opt.state_dict()["kfac"]["preconditioner"]["layers"]["wte"]
    assert [tuple(own.shape) for own in state["factors"]] == [(1, 50257), (1, 4, 4)]


def test_embeddings_can_be_left_to_the_fallback() -> None:
    model = GPT()
    opt = KFAC(model, LOSS, exclude=nn.Embedding)
    assert opt.coverage()["wte.weight"] == "adam"
    assert opt.coverage()["head.weight"] == "kfac"
