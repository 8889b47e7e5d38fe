"""The networks and data of the training comparison are what they are said to be."""

from __future__ import annotations

import math

import pytest
import torch
from evidence.data import Sources
from evidence.families.linear_models import LinearRegression, LogisticRegression
from evidence.families.photograph import Photograph
from evidence.families.physics import Poisson, PoissonResidual, solution
from evidence.families.text import Text
from evidence.optimizers import OPTIMIZERS
from evidence.sequence_models import CharacterTransformer, TransformerBlock
from evidence.tasks import TASKS
from torch import Tensor, nn


def test_residual_is_that_of_second_derivatives() -> None:
    torch.manual_seed(0)
    model = PoissonResidual(5).double()
    x = torch.rand(6, 4, dtype=torch.float64)
    with torch.no_grad():
        found = model(x)

    def value(point: Tensor) -> Tensor:
        u: Tensor = model.network(point)
        return u.squeeze()

    for row, point in zip(found, x):
        hessian = torch.autograd.functional.hessian(value, point[:2])
        source = 5 * math.pi**2 * solution(point[None, :2])
        expected = torch.cat([(hessian.trace() + source) / 10, 3 * value(point[2:])[None]])
        torch.testing.assert_close(row, expected.detach())


def test_points_of_the_boundary_are_on_it() -> None:
    x = Poisson(40).data(Sources()).train.x[:, 2:]
    assert ((x == 0) | (x == 1)).any(1).all()
    assert solution(x).abs().max() < 1e-5


def test_block_is_that_of_torch() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, causal=True).double()
    other = nn.TransformerEncoderLayer(
        8, 2, 32, 0.0, "gelu", norm_first=True, batch_first=True, dtype=torch.float64
    )
    attention = block.queries_keys_values, block.projection
    theirs = [
        other.self_attn.in_proj_weight, other.self_attn.in_proj_bias,
        *other.self_attn.out_proj.parameters(),
        *other.linear1.parameters(), *other.linear2.parameters(),
        *other.norm1.parameters(), *other.norm2.parameters(),
    ]  # fmt: skip
    modules = (*attention, block.path, block.first, block.second)
    ours = [p for module in modules for p in module.parameters()]
    with torch.no_grad():
        for mine, copied in zip(theirs, ours, strict=True):
            mine.copy_(copied)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    torch.testing.assert_close(block(x), other(x, src_mask=mask))


def test_characters_are_predicted_from_earlier_ones() -> None:
    torch.manual_seed(0)
    model = CharacterTransformer(6, 8)
    x = torch.randint(128, (1, 6))
    changed = x.clone()
    changed[0, 4] = (x[0, 4] + 1) % 128
    difference = (model(x) - model(changed)).abs().amax((0, 2))
    assert (difference[:4] == 0).all()
    assert (difference[4:] > 0).all()


def test_text_is_shifted_by_one() -> None:
    split = Text(16, 2).data(Sources())
    assert torch.equal(split.train.x[:, 1:], split.train.y[:, :-1])
    assert split.train.x.max() < 128
    words = "".join(map(chr, split.train.x.flatten().tolist()))
    assert "def " in words


@pytest.mark.parametrize("family", [LinearRegression(), LogisticRegression(), Photograph(16)])
def test_examples_to_test_on_are_others(family: LinearRegression) -> None:
    split = family.data(Sources())
    train, test = ({tuple(row) for row in part.x.tolist()} for part in (split.train, split.test))
    assert train
    assert test
    assert not train & test


def test_signal_to_noise_ratio() -> None:
    family = Photograph(20)
    test = family.data(Sources()).test

    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.values + 0.1

    model = Wrong()
    model.values = test.y
    assert len(test) <= 500  # one chunk
    assert family.test(model, test) == pytest.approx(20, abs=1e-3)


def test_muon_takes_inner_matrices() -> None:
    pytest.importorskip("pytorch_optimizer")
    model = CharacterTransformer(6, 8, depth=1)
    [optimizer] = OPTIMIZERS["Muon"](model, TASKS["k"], {"lr": 0.1}).optimizers
    names = {p: name for name, p in model.named_parameters()}
    by_muon, rest = ([names[p] for p in group["params"]] for group in optimizer.param_groups)
    assert by_muon == [
        f"blocks.0.{name}.weight"
        for name in ("queries_keys_values", "projection", "path.0", "path.2")
    ]
    assert sorted([*by_muon, *rest]) == sorted(names.values())
    assert all(group["lr"] == 0.1 for group in optimizer.param_groups)
