"""Batches without a target that counts are left out of every average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ggn import dense_ggn
from torch import Generator, Tensor, nn

from einconv_kfac.curvature import KroneckerFactors, kronecker_factors, verify

FISHERS = ["exact", "mc", "empirical", "forward-only"]
KINDS = ["kfac", "ekfac", "diagonal"]


def batch(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (count,), generator=generator)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def padding() -> tuple[Tensor, Tensor]:
    x, _ = batch(5, 2)
    return x, torch.full((5,), 2)


LOSSES = {
    "ignored": {"ignore_index": 2},
    "without weight": {"weight": torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)},
}


def assert_equal(got: KroneckerFactors, expected: KroneckerFactors) -> None:
    assert list(got) == list(expected)
    for name in got:
        assert torch.equal(got[name].to_dense(), expected[name].to_dense())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fisher", FISHERS)
def test_padding_is_as_absent(
    fisher: Any, kind: Any, options: dict[str, Any], reduction: str
) -> None:
    if kind != "kfac" and fisher == "forward-only":
        pytest.skip("no gradients")
    loss_fn, data = nn.CrossEntropyLoss(**options, reduction=reduction), [batch(6, 0), batch(3, 1)]
    own: Any = {"fisher": fisher, "kind": kind}
    expected = kronecker_factors(model(), loss_fn, data, **own)
    for padded in ([padding(), *data], [data[0], padding(), data[1], padding()]):
        if fisher != "mc":  # or other samples are drawn
            assert_equal(kronecker_factors(model(), loss_fn, padded, **own), expected)
    assert_equal(kronecker_factors(model(), loss_fn, [*data, padding()], **own), expected)


class SharedWeight(nn.Module):
    """A model that uses the weight of a layer past its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x))
        return nn.functional.linear(hidden, self.layer.weight)[:, :3]


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("make", [model, lambda: SharedWeight().double()])
@pytest.mark.parametrize("is_module", [False, True])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_padding_is_as_absent_from_functions(
    fisher: Any, is_module: bool, make: Any, options: dict[str, Any]
) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 2 * nn.functional.cross_entropy(output, target, **options)

    loss_fn = nn.CrossEntropyLoss(**options) if is_module else loss
    own, data = make(), [batch(6, 0), batch(3, 1)]
    expected = kronecker_factors(own, loss_fn, data, fisher=fisher)
    for padded in ([padding(), *data], [data[0], padding(), data[1], padding()]):
        assert_equal(kronecker_factors(own, loss_fn, padded, fisher=fisher), expected)


def penalised(output: Tensor, target: Tensor) -> Tensor:
    scores = nn.functional.cross_entropy(output, target, ignore_index=2, reduction="sum")
    return scores / len(target) + output.square().mean()


def unreduced(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, ignore_index=2, reduction="none").mean()


def hinge(output: Tensor, target: Tensor) -> Tensor:
    scores = nn.functional.cross_entropy(output, target, ignore_index=2, reduction="sum")
    return scores / len(target) + (output - 1000).relu().mean()


@pytest.mark.parametrize("loss", [penalised, unreduced, hinge])
def test_padding_counts_that_enters_a_loss(loss: Any) -> None:
    linear, (x, y) = nn.Linear(4, 3).double(), batch(5, 0)
    x = x[:1].expand(5, 4)
    nothing = torch.full((5,), 2)
    got = kronecker_factors(linear, loss, [(x, y), (x, nothing)], fisher="exact")[""].to_dense()
    both = torch.cat([x, x]), torch.cat([y, nothing])
    torch.testing.assert_close(got, dense_ggn(linear, loss, *both, ""))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_block_is_the_ggn_of_what_counts(reduction: str) -> None:
    linear, (x, y) = nn.Linear(4, 3).double(), batch(1, 0)
    loss_fn = nn.CrossEntropyLoss(ignore_index=2, reduction=reduction)
    data = [padding(), (x, y)]
    got = kronecker_factors(linear, loss_fn, data, fisher="exact")[""].to_dense()
    torch.testing.assert_close(got, dense_ggn(linear, loss_fn, x, y, ""))


def test_examples_that_are_ignored_within_a_batch_count() -> None:
    linear, (x, y) = nn.Linear(4, 3).double(), batch(3, 0)
    x = x[:1].expand(3, 4)
    loss_fn = nn.CrossEntropyLoss(ignore_index=2)
    y[1] = 2
    got = kronecker_factors(linear, loss_fn, [(x, y)], fisher="exact")[""].to_dense()
    torch.testing.assert_close(got, dense_ggn(linear, loss_fn, x, y, ""))


class Selecting(nn.Module):
    """A model that returns the scores of some of its examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        scores: Tensor = self.layer(x)
        return scores[kept]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_empty_output(fisher: Any, kind: Any) -> None:
    selecting, (x, y) = Selecting().double(), batch(4, 0)
    every, none = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    data = [((x, every), y), ((x, none), y[:0])]
    own: Any = {"fisher": fisher, "kind": kind}
    got = kronecker_factors(selecting, nn.CrossEntropyLoss(), data, **own)
    assert_equal(got, kronecker_factors(selecting, nn.CrossEntropyLoss(), data[:1], **own))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_nothing_but_padding(fisher: Any, kind: Any) -> None:
    loss_fn = nn.CrossEntropyLoss(ignore_index=2)
    with pytest.raises(RuntimeError, match=r"'0' need data, got none.*no batch with a target"):
        kronecker_factors(model(), loss_fn, [padding()], fisher=fisher, kind=kind)
    with pytest.raises(RuntimeError, match=r"'0' need data, got none"):
        verify(model(), loss_fn, padding())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_batch_of_no_examples_is_refused(fisher: Any, kind: Any) -> None:
    data = [batch(4, 0), batch(0, 0)]
    with pytest.raises(ValueError, match=r"input of '0' \(Linear\) must be a non-empty batch"):
        kronecker_factors(model(), nn.CrossEntropyLoss(), data, fisher=fisher, kind=kind)


@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_divergence_is_cross_entropy_with_soft_targets(fisher: Any, reduction: str) -> None:
    x, q = batch(6, 0)[0], torch.rand(6, 3, generator=Generator().manual_seed(1)).double()
    q, log = q / q.sum(1, keepdim=True), nn.Sequential(*model(), nn.LogSoftmax(1))
    other = nn.CrossEntropyLoss(reduction="sum" if reduction == "sum" else "mean")
    expected = kronecker_factors(model(), other, [(x, q)], fisher=fisher)
    got = kronecker_factors(log, nn.KLDivLoss(reduction=reduction), [(x, q)], fisher=fisher)
    for name in expected:
        torch.testing.assert_close(got[name].to_dense(), expected[name].to_dense())
