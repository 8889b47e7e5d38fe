"""Layers whose calls have rows of some examples, or rows in no regular order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac.curvature import kronecker_factors

FISHERS: tuple[Any, ...] = ("exact", "forward-only")


class Pooled(nn.Module):
    """A layer on all positions of all examples, whose features are averaged per example.

    Args:
        mode: How the layer is called.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.mode = nn.Linear(4, 5), nn.Linear(5, 3), mode

    def forward(self, x: Tensor) -> Tensor:
        n, positions, _ = x.shape
        if self.mode == "one by one":
            return torch.stack([self.head(self.layer(each).tanh().mean(0)[None])[0] for each in x])
        if self.mode == "two by two":
            return torch.cat([self.head(self.layer(p).tanh().mean(1)) for p in x.split(2)])
        if self.mode == "shuffled":
            order = torch.randperm(n * positions, generator=torch.Generator().manual_seed(0))
            rows = self.layer(x.flatten(0, 1)[order]).tanh() / positions
            sums = rows.new_zeros(n, 5).index_add(0, order // positions, rows)
            return self.head(sums)
        return self.head(self.layer(x).tanh().mean(1))


def blocks(mode: str, shape: tuple[int, ...], **options: Any) -> list[Tensor]:
    """The blocks of a model, on fixed data."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).double()
    y = torch.randint(3, shape[:1], generator=generator)
    found = kronecker_factors(Pooled(mode).double(), nn.CrossEntropyLoss(), [(x, y)], **options)
    return [block.to_dense() for block in found.values()]


@pytest.mark.parametrize("mode", ["one by one", "two by two", "shuffled"])
@pytest.mark.parametrize("shape", [(6, 4, 4), (4, 4, 4), (3, 2, 4)])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "mc", "forward-only"])
def test_blocks_are_those_of_one_call(mode: str, shape: tuple[int, ...], fisher: str) -> None:
    for got, want in zip(blocks(mode, shape, fisher=fisher), blocks("whole", shape, fisher=fisher)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", ["one by one", "two by two", "shuffled"])
@pytest.mark.parametrize(
    "options",
    [
        {"fisher": "exact", "approximation": "reduce"},
        {"fisher": "exact", "kind": "ekfac"},
        {"fisher": "empirical", "kind": "diagonal"},
        {"fisher": "forward-only", "approximation": "reduce"},
    ],
)
def test_what_needs_single_examples_is_refused(mode: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"The calls of '(layer|head)' must.*exclude="):
        blocks(mode, (6, 4, 4), **options)
    if mode == "shuffled":
        assert blocks(mode, (6, 4, 4), **options, exclude=["layer"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [(2, 4), (3, 3), (5, 1, 2)])
def test_factors_do_not_depend_on_the_sizes_of_batches(
    sizes: tuple[int, ...], reduction: str
) -> None:
    """The model flattens its outputs, so that the loss has more examples than inputs have rows."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    model, loss_fn = nn.Sequential(layer, nn.Flatten(0, -2)), nn.MSELoss(reduction=reduction)
    xs = [torch.randn(n, 5, 2, 4).double() for n in sizes]
    data = [(x, torch.randn(len(x) * 10, 3).double()) for x in xs]
    block = kronecker_factors(model, loss_fn, data, fisher="exact")["0"]
    rows = torch.cat([x.flatten(0, 2) for x in xs])
    columns = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    torch.testing.assert_close(block.A[0], columns.T @ columns / len(rows))
    hessian = torch.eye(3).double() * 2 / (3 if reduction == "mean" else 1)
    torch.testing.assert_close(block.B[0], hessian)
    assert block.scale == (1 if reduction == "mean" else len(rows))


class Decoder(nn.Module):
    """Every position adds a call on its own rows to one on rows that all positions share.

    Args:
        time_first: Whether the outputs of a position, or of a sequence, are next to each other.
    """

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.time_first = time_first
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.rows: list[Tensor] = []
        self.made: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows, self.made = [x], [self.layer(x)]
        outputs = []
        for _ in range(3):
            self.rows.append(self.made[-1].tanh().detach())
            self.made.append(self.layer(self.rows[-1]))
            outputs.append(self.head((self.made[0] + self.made[-1]).tanh()))
        return torch.stack(outputs, 0 if self.time_first else 1).flatten(0, 1)


@pytest.mark.parametrize("time_first", [True, False])
def test_inputs_do_not_depend_on_gradients(time_first: bool) -> None:
    """Rows that positions share are told from rows of one position, without their gradients."""
    x, y = torch.randn(5, 4).double(), torch.randint(3, (15,))
    exact, forward = (
        kronecker_factors(Decoder(time_first).double(), nn.CrossEntropyLoss(), [(x, y)], fisher=f)
        for f in ("exact", "forward-only")
    )
    for name, block in exact.items():
        torch.testing.assert_close(forward[name].A, block.A)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("time_first", [True, False])
def test_a_layer_with_shared_and_with_scattered_rows(fisher: Any, time_first: bool) -> None:
    model, loss_fn = Decoder(time_first).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (15,))
    block = kronecker_factors(model, loss_fn, [(x, y)], fisher=fisher, exclude=["head"])[
        "layer"
    ].to_dense()
    outputs = model(x)
    probabilities = outputs.detach().softmax(-1)
    squares = torch.zeros(4, 4).double()
    for example, p in enumerate(probabilities):
        roots = p.sqrt()[:, None] * (torch.eye(3).double() - p)  # sum of squares: the Hessian
        if fisher == "empirical":
            roots = (p - torch.eye(3).double()[y[example]])[None]
        for root in roots:
            found = torch.autograd.grad(
                outputs[example], model.made, root, retain_graph=True, materialize_grads=True
            )
            squares += torch.cat(found).T @ torch.cat(found)
    rows = torch.cat(model.rows)
    rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    want = torch.kron(squares, rows.T @ rows) / (len(y) * len(rows))
    torch.testing.assert_close(block[0], want)


class Recurrent(nn.Module):
    """A layer on the state of a sequence, with outputs ``[time, class, sequence]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.rows: list[Tensor] = []
        self.made: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows, self.made = [], []
        state, outputs = x.new_zeros(x.shape[1:]), []
        for step in x:
            self.rows.append(state.detach())
            self.made.append(self.layer(state))
            state = (self.made[-1] + step).tanh()
            outputs.append(self.head(state).T)
        return torch.stack(outputs)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("sequences", [3, 5, 6])
def test_calls_that_only_later_outputs_depend_on(fisher: Any, sequences: int) -> None:
    """The first dimension is time, so that the first two examples do not reach the last calls."""
    model, loss_fn = Recurrent().double(), nn.CrossEntropyLoss()
    x, y = torch.randn(5, sequences, 4).double(), torch.randint(3, (5, sequences))
    block = kronecker_factors(model, loss_fn, [(x, y)], fisher=fisher, exclude=["head"])[
        "layer"
    ].to_dense()
    outputs = model(x)
    probabilities = outputs.detach().softmax(1)
    squares = torch.zeros(4, 4).double()
    for time in range(5):
        roots = torch.zeros(0, *outputs.shape).double()
        p = probabilities[time]
        if fisher == "empirical":
            roots = torch.zeros(1, *outputs.shape).double()
            roots[0, time] = (p - nn.functional.one_hot(y[time], 3).double().T) / sequences
        else:
            for place in range(sequences):
                own = torch.zeros(3, *outputs.shape).double()
                q = p[:, place]
                own[:, time, :, place] = q.sqrt()[:, None] * (torch.eye(3).double() - q)
                roots = torch.cat([roots, own / sequences**0.5])
        for root in roots:
            found = torch.autograd.grad(
                outputs, model.made, root, retain_graph=True, materialize_grads=True
            )
            squares += torch.cat(found).T @ torch.cat(found)
    rows = torch.cat(model.rows)
    rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    want = torch.kron(squares, rows.T @ rows) / (5 * len(rows))
    torch.testing.assert_close(block[0], want)


class TwoBatches(nn.Module):
    """A layer that is called on two batches of different sizes, as in semi-supervised training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer(u)


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (6, 1), (2, 6), (3, 7)])
def test_batches_of_two_sizes(sizes: tuple[int, int]) -> None:
    """A squared error of all rows: the block is that of one batch that holds both."""
    generator = torch.Generator().manual_seed(1)
    x, u = (torch.randn(n, 4, generator=generator).double() for n in sizes)

    def loss(outputs: tuple[Tensor, Tensor], _: Any) -> Tensor:
        return sum((o.square().sum() for o in outputs), torch.zeros(())) / 2

    data = [((x, u), None)]
    blocks = {f: kronecker_factors(TwoBatches(), loss, data, fisher=f)["layer"] for f in FISHERS}
    found = blocks["exact"].to_dense()
    rows = torch.cat([torch.cat([x, u]), torch.ones(sum(sizes), 1)], 1)
    expected = torch.kron(torch.eye(3).double(), rows.T @ rows)
    torch.testing.assert_close(found.squeeze(0), expected)
    torch.testing.assert_close(blocks["forward-only"].A, blocks["exact"].A)


@pytest.mark.parametrize(
    "options",
    [{"approximation": "reduce"}, {"kind": "ekfac"}],
)
def test_batches_of_two_sizes_are_refused_where_examples_are_needed(
    options: dict[str, Any],
) -> None:
    generator = torch.Generator().manual_seed(1)
    x, u = (torch.randn(n, 4, generator=generator).double() for n in (6, 4))

    def loss(outputs: tuple[Tensor, Tensor], _: Any) -> Tensor:
        return sum((o.square().sum() for o in outputs), torch.zeros(())) / 2

    with pytest.raises(ValueError, match=r"The calls of 'layer' must.*Use approximation='expand'"):
        kronecker_factors(TwoBatches(), loss, [((x, u), None)], **options)
    kronecker_factors(TwoBatches(), loss, [((x, u), None)])
