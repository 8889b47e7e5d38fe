"""What the factors do not depend on, and the limit of many samples."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from einconv_kfac.curvature import KroneckerFactors, kronecker_factors

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def network(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(6, 4, 2, stride=2, padding_mode="circular", padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).double()


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(1)
    x = torch.randn(count, 4, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def assert_equal(got: KroneckerFactors, expected: KroneckerFactors) -> None:
    assert list(got) == list(expected)
    for name in got:
        torch.testing.assert_close(got[name].A, expected[name].A, **TOLERANCE)
        torch.testing.assert_close(got[name].B, expected[name].B, **TOLERANCE)


FISHERS = ["exact", "empirical", "forward-only"]


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_invariances(fisher: str, approximation: str) -> None:
    x, y = batch()
    model, mean = network(), nn.CrossEntropyLoss()
    options: Any = {"fisher": fisher, "approximation": approximation}
    factors = kronecker_factors(model, mean, [(x, y)], **options)
    twice = kronecker_factors(model, mean, [(x.repeat(2, 1, 1, 1), y.repeat(2))], **options)
    assert_equal(twice, factors)
    uneven = [(x[:1], y[:1]), (x[1:], y[1:])]
    assert_equal(kronecker_factors(model, mean, uneven, **options), factors)
    total = kronecker_factors(model, nn.CrossEntropyLoss(reduction="sum"), uneven, **options)
    assert_equal(total, factors)
    assert {block.scale for block in total.values()} == {len(x)}
    assert {block.scale for block in factors.values()} == {1.0}
    inplace = kronecker_factors(network(inplace=True), mean, [(x, y)], **options)
    assert_equal(inplace, factors)


@pytest.mark.parametrize("fisher", FISHERS)
def test_padding_modes_enter_through_the_padded_input(fisher: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect").double()
    plain = nn.Conv2d(2, 3, 3).double()
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    padded, loss_fn = functional.pad(x, (2, 2, 1, 1), mode="reflect"), nn.MSELoss()
    y = torch.randn_like(conv(x))
    for approximation in ("expand", "reduce"):
        options: Any = {"fisher": fisher, "approximation": approximation}
        expected = kronecker_factors(plain, loss_fn, [(padded, y)], **options)
        assert_equal(kronecker_factors(conv, loss_fn, [(x, y)], **options), expected)


class Siamese(nn.Module):
    """A layer that is called on both halves of its input, or once on both at a time."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.layer, self.split = nn.Linear(3, 4), split

    def forward(self, x: Tensor) -> Tensor:  # [n, 2, 3]
        if self.split:
            hidden = torch.stack([self.layer(x[:, 0]), self.layer(x[:, 1])], 1)
        else:
            hidden = self.layer(x)
        return torch.tanh(hidden).flatten(1)


class Tied(nn.Module):
    """Two modules of one weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.stack([self.first(x[:, 0]), self.second(x[:, 1])], 1)
        return torch.tanh(hidden).flatten(1)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_calls_are_positions(fisher: str, approximation: str) -> None:
    torch.manual_seed(0)
    once, several, tied = Siamese(False).double(), Siamese(True).double(), Tied().double()
    several.load_state_dict(once.state_dict())
    tied.first.load_state_dict(once.layer.state_dict())
    x, y = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    options: Any = {"fisher": fisher, "approximation": approximation}
    expected = kronecker_factors(once, nn.MSELoss(), [(x, y)], **options)
    assert_equal(kronecker_factors(several, nn.MSELoss(), [(x, y)], **options), expected)
    (block,) = kronecker_factors(tied, nn.MSELoss(), [(x, y)], **options).values()
    assert block.parameters == ("first.weight", "first.bias")
    torch.testing.assert_close(block.A, expected["layer"].A, **TOLERANCE)
    torch.testing.assert_close(block.B, expected["layer"].B, **TOLERANCE)


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.MSELoss()])
def test_monte_carlo_converges_to_exact(loss_fn: nn.Module) -> None:
    (x, y), model = batch(), network()
    x, y = x.repeat(10, 1, 1, 1), y.repeat(10)  # ten samples of each example at once
    if isinstance(loss_fn, nn.MSELoss):
        y = torch.zeros(60, 3, dtype=torch.float64)
    exact = kronecker_factors(model, loss_fn, [(x, y)], fisher="exact")
    errors = []
    for samples in (2, 200):
        state = torch.get_rng_state()
        sampled = kronecker_factors(model, loss_fn, [(x, y)], mc_samples=samples)
        assert torch.equal(torch.get_rng_state(), state)
        norms = [(sampled[n].B - exact[n].B).norm() / exact[n].B.norm() for n in exact]
        errors.append(float(torch.stack(norms).mean()))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 4  # a hundred times the samples, a tenth of the error


def test_seed_decides_the_samples() -> None:
    (x, y), model, loss_fn = batch(), network(), nn.CrossEntropyLoss()
    first = kronecker_factors(model, loss_fn, [(x, y)], seed=3)
    assert_equal(kronecker_factors(model, loss_fn, [(x, y)], seed=3), first)
    other = kronecker_factors(model, loss_fn, [(x, y)], seed=4)
    assert not torch.equal(other["5"].B, first["5"].B)


@pytest.mark.parametrize("fisher", FISHERS)
def test_checkpointed_layers(fisher: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, model: nn.Sequential) -> None:
            super().__init__()
            self.first, self.rest = model[:4], model[4:]

        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(self.first, x, use_reentrant=False)
            result: Tensor = self.rest(hidden)
            return result

    data, loss_fn = [batch(), batch()], nn.CrossEntropyLoss()
    expected = kronecker_factors(network(), loss_fn, data, fisher=fisher)
    got = kronecker_factors(Checkpointed(network()), loss_fn, data, fisher=fisher)
    for block, reference in zip(got.values(), expected.values()):
        torch.testing.assert_close(block.A, reference.A, **TOLERANCE)
        torch.testing.assert_close(block.B, reference.B, **TOLERANCE)


def test_streaming_holds_one_batch_at_a_time() -> None:
    counts: list[int] = []

    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(6):
                gc.collect()
                counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
                yield batch()

    kronecker_factors(network(), nn.CrossEntropyLoss(), Stream(), kind="ekfac")
    assert len(counts) == 12
    for run in (counts[:6], counts[6:]):
        assert run[5] == run[3]  # after the first batches nothing is added


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    kronecker_factors(network(), nn.CrossEntropyLoss(), [batch()] * 2, progress=True)
    assert "2/2" in capfd.readouterr().err
    kronecker_factors(network(), nn.CrossEntropyLoss(), [batch()] * 2)
    assert capfd.readouterr().err == ""


def test_autocast_and_channels_last_and_compiled() -> None:
    (x, y), loss_fn = batch(), nn.CrossEntropyLoss()
    expected = kronecker_factors(network(), loss_fn, [(x, y)], fisher="exact")
    last = network().to(memory_format=torch.channels_last)
    strided = x.contiguous(memory_format=torch.channels_last)
    assert_equal(kronecker_factors(last, loss_fn, [(strided, y)], fisher="exact"), expected)
    compiled = torch.compile(network(), backend="eager")
    assert_equal(kronecker_factors(compiled, loss_fn, [(x, y)], fisher="exact"), expected)
    single = network().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = kronecker_factors(single, loss_fn, [(x.float(), y)], fisher="exact")
    for name, block in mixed.items():
        assert block.A.dtype == block.B.dtype == torch.float32
        for got, exact in ((block.A, expected[name].A), (block.B, expected[name].B)):
            assert (got - exact).norm() < 0.05 * exact.norm()
