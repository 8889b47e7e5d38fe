"""Recurrent layers: the recorded loop against torch's functions, and the factors by definition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ggn import loss_hessian
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from einconv_kfac.curvature import find_layers, kronecker_factors
from einconv_kfac.curvature.estimation.capture import LayerCapture

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
LENGTHS = torch.tensor([5, 3, 3, 1])
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"batch_first": True, "num_layers": 2},
    {"bidirectional": True},
    {"bidirectional": True, "num_layers": 3, "dropout": 0.5},
    {"batch_first": True, "num_layers": 2, "dropout": 0.5},
]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layers() -> Iterator[Any]:
    for name, kind in KINDS.items():
        for options in OPTIONS:
            yield pytest.param(kind, options, id=f"{name}-{options}")
    yield pytest.param(nn.RNN, {"nonlinearity": "relu"}, id="rectifiers")
    projected = {"proj_size": 2, "num_layers": 2, "bidirectional": True}
    yield pytest.param(nn.LSTM, projected, id="projected")


def results(module: nn.Module, given: Any) -> list[Tensor]:
    """Outputs, states, gradients, and a random number drawn after them."""
    torch.manual_seed(1)
    found = module(given)
    y, states = (
        found if isinstance(found[0], (nn.utils.rnn.PackedSequence, Tensor)) else (found, ())
    )
    y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
    tensors = [y, *(states if isinstance(states, tuple) else (states,))]
    total = sum((t.sin().sum() for t in tensors), torch.zeros(()))
    return [*tensors, *torch.autograd.grad(total, list(module.parameters())), torch.rand(2)]


@pytest.mark.parametrize(("kind", "options"), list(layers()))
@pytest.mark.parametrize("form", ["batch", "one", "packed", "unsorted"])
def test_recorded_loop_equals_torchs(kind: Any, options: dict[str, Any], form: str) -> None:
    torch.manual_seed(0)
    module = kind(3, 4, **options).double()
    x = random(4, 5, 3) if options.get("batch_first") else random(5, 4, 3)
    given: Any = x if form == "batch" else x[0] if options.get("batch_first") else x[:, 0]
    if form in {"packed", "unsorted"}:
        lengths = LENGTHS if form == "packed" else LENGTHS[[1, 3, 0, 2]]
        order = {"batch_first": options.get("batch_first", False)}
        given = pack_padded_sequence(x, lengths, enforce_sorted=form == "packed", **order)
    expected, own = results(module, given), find_layers(module)
    with LayerCapture(own) as capture:
        found = results(module, given)
        assert {call.layer for call in capture.calls} == {layer.name for layer in own}
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert [t.stride() for t in found] == [t.stride() for t in expected]
    assert {n for layer in own for n in layer.parameters} == dict(module.named_parameters()).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_while_nothing_is_recorded(kind: str) -> None:
    module = KINDS[kind](3, 4).double()
    with LayerCapture(find_layers(module)) as capture, capture.paused():
        y, _ = module(random(5, 4, 3))
        assert y.grad_fn.name() == KINDS[kind](3, 4).double()(random(5, 4, 3))[0].grad_fn.name()
        assert not capture.calls


class Read(nn.Module):
    """A recurrent layer, and the sum of its sequence of outputs as the output of the model."""

    def __init__(self, kind: str, packed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = KINDS[kind](3, 2, batch_first=True)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return self.layer(x)[0].sin().sum(1)
        packed = pack_padded_sequence(x, LENGTHS, batch_first=True)
        return pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0].sin().sum(1)


def expanded(model: Read, kind: str, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """``A`` and ``B`` by definition, for half the sum of squared outputs.

    Torch's own cell runs step by step, with biases of each step, whose gradients are those at the
    products with the weights.
    """
    cell = CELLS[kind](3, 2).double()
    weights = {n.removesuffix("_l0"): p.detach() for n, p in model.layer.named_parameters()}
    lengths = LENGTHS.tolist() if model.packed else [x.shape[1]] * len(x)
    factors = {}
    for name, size in (("ih", 3), ("hh", 2)):
        a, b = torch.zeros(size + 1, size + 1).double(), 0
        for example, length in zip(x, lengths):
            states: list[Tensor] = []

            def output(
                biases: Tensor,
                example: Tensor = example,
                length: int = length,
                name: str = name,
                states: list[Tensor] = states,
            ) -> Tensor:
                hidden, total = None, torch.zeros(2).double()
                states.clear()
                for step in range(length):
                    h = hidden[0] if isinstance(hidden, tuple) else hidden
                    states.append(torch.zeros(2).double() if h is None else h.detach())
                    own = {**weights, f"bias_{name}": biases[step]}
                    hidden = functional_call(cell, own, (example[step], hidden))
                    total = total + (hidden[0] if isinstance(hidden, tuple) else hidden).sin()
                return total

            start = weights[f"bias_{name}"].expand(length, -1)
            g = jacrev(output)(start)  # c s co
            output(start)
            inputs = example[:length] if name == "ih" else torch.stack(states)
            columns = torch.cat([inputs, torch.ones(length, 1).double()], 1)
            a = a + columns.T @ columns
            b = b + torch.einsum("csi,csj->ij", g, g)
        factors[f"layer.weight_{name}_l0"] = a / len(x), b / sum(lengths)
    return factors


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_several_steps(kind: str, packed: bool) -> None:
    model, x = Read(kind, packed).double(), random(4, 5, 3)
    data, loss_fn = [(x, torch.zeros(4, 2).double())], nn.MSELoss(reduction="sum")
    factors = kronecker_factors(model, loss_fn, data, fisher="exact")
    expected = expanded(model, kind, x)
    assert factors.keys() == expected.keys()
    for name, (a, b) in expected.items():
        (dense,) = factors[name].to_dense()
        torch.testing.assert_close(dense, 2 * len(x) * torch.kron(b, a), **TOLERANCE)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_diagonal_of_several_steps_is_exact(kind: str, packed: bool) -> None:
    model, x = Read(kind, packed).double(), random(4, 5, 3)
    own = dict(model.named_parameters())
    outputs = model(x).flatten()
    found_rows = [
        torch.autograd.grad(output, list(own.values()), retain_graph=True) for output in outputs
    ]
    rows = {name: torch.stack(parts) for name, parts in zip(own, zip(*found_rows))}
    data, loss_fn = [(x, torch.zeros(4, 2).double())], nn.MSELoss(reduction="sum")
    factors = kronecker_factors(model, loss_fn, data, kind="diagonal", fisher="exact")
    for layer in find_layers(model):
        found = layer.from_matrix(factors[layer.name].values)
        for name in layer.parameters:
            torch.testing.assert_close(found[name], 2 * rows[name].square().sum(0), **TOLERANCE)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_of_one_example_is_exact(kind: str, approximation: Any) -> None:
    """A Kronecker product is the GGN where there is one position and one example."""
    model, x = Read(kind).double(), random(1, 1, 3)
    data = [(x, torch.zeros(1, 2).double())]
    factors = kronecker_factors(
        model, nn.MSELoss(), data, approximation=approximation, fisher="exact"
    )
    own = {name: p.detach() for name, p in model.named_parameters()}
    rows = jacrev(lambda p: functional_call(model, p, x).flatten(), chunk_size=1)(own)
    hessian = loss_hessian(nn.MSELoss(), model(x), data[0][1])
    for block in factors.values():
        columns = [rows[name].reshape(2, len(own[name]), -1) for name in block.parameters]
        flat = torch.cat(columns, -1).flatten(1)
        torch.testing.assert_close(block.to_dense()[0], flat.T @ hessian @ flat, **TOLERANCE)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    cell = CELLS[kind](3, 4, bias=bias).double()
    own, found = find_layers(cell), []
    for watched in ([], own):
        with LayerCapture(watched) as capture:
            state = None
            for x in random(3, 5, 3):
                state = cell(x, state)
            tensors = state if isinstance(state, tuple) else (state,)
            total = sum((t.sin().sum() for t in tensors), torch.zeros(()))
            found.append([*tensors, *torch.autograd.grad(total, list(cell.parameters()))])
            names = [call.layer for call in capture.calls]
    assert sorted(names) == sorted(3 * ["weight_ih", "weight_hh"])
    torch.testing.assert_close(*found, **TOLERANCE)
