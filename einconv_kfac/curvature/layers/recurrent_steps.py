"""Recurrent layers and cells, step by step, so that their products with weights are recorded.

Torch runs a recurrent layer as one function. While its calls are recorded, the function is
replaced by an explicit loop of the same equations. Where the input of a weight does not depend on
the step before, all steps are one call ``[n, t, d]``; elsewhere each step is a call ``[n, d]``.

Packed sequences are padded. Recorded inputs then end with an entry that is 1 for steps of a
sequence and 0 after its end, and the rest is 0 there, too. Both are multiplied by the square root
of ``n t / sum_n t_n``: ``B`` is averaged over all ``n t`` steps, and its product with ``A`` is
that of the ``t_n`` steps of each sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.layers.interception import Records

State: TypeAlias = "tuple[Tensor, ...]"
"""Hidden state ``[n, h]`` and, of an LSTM, cell state."""
Cell: TypeAlias = "Callable[[Tensor, Tensor, State], State]"
"""Returns the next state for the products with the input and with the hidden state, and a state."""


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    """Return the next state of an LSTM."""
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    """Return the next state of a gated recurrent unit."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    z = (x_z + h_z).sigmoid()
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return ((1 - z) * n + z * state[0],)


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    """Return the next state of a simple recurrence."""
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    """Return the next state of a simple recurrence with rectifiers."""
    return ((x + h).relu(),)


CELLS: dict[str, Cell] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _tanh, "rnn_relu": _relu}
"""By the name of torch's function for layers; those for cells end with ``_cell``."""


class _Weights:
    """The products with the weights of a module, recorded.

    Args:
        records: Takes the calls of each weight.
        parameters: By name; a missing bias is zero.
    """

    def __init__(self, records: Records, parameters: dict[str, Tensor]) -> None:
        self._records, self._parameters = records, parameters

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def product(self, name: str, x: Tensor, mask: Tensor | None, ratio: float) -> Tensor:
        """Return ``W x + b``.

        Args:
            name: Name of the weight.
            x: Inputs ``[n, t, d]`` or ``[n, d]``.
            mask: Where steps belong to a sequence; ``None`` for everywhere.
            ratio: ``n t / sum_n t_n``.
        """
        y = functional.linear(x, self._parameters[name], self._parameters.get(bias_of(name)))
        if name in self._records:
            self._records[name](x if mask is None else _marked(x, mask, ratio), y)
        return y


def _marked(x: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """Return the recorded inputs of padded sequences."""
    weight: Tensor = mask.unsqueeze(-1).to(x.dtype) * ratio**0.5
    return torch.cat([x * weight, weight], -1)


def bias_of(weight: str) -> str:
    """Return the name of the bias that belongs to a weight; a projection has none."""
    return "" if weight.startswith("weight_hr") else weight.replace("weight", "bias", 1)


@dataclass(frozen=True)
class _Sequences:
    """The lengths of sequences, the longest first.

    Args:
        mask: Where steps belong to a sequence, ``[t, n]``, or ``None`` for everywhere.
    """

    mask: Tensor | None = None

    @staticmethod
    def packed(sizes: Tensor, device: torch.device) -> _Sequences:
        """Return those of packed sequences, from the number of sequences at each step."""
        counts = sizes.to(device)
        return _Sequences(torch.arange(int(sizes[0]), device=device) < counts[:, None])

    @property
    def ratio(self) -> float:
        """See `_Weights.product`."""
        return 1.0 if self.mask is None else self.mask.numel() / int(self.mask.sum())

    def padded(self, x: Tensor) -> Tensor:
        """Return packed values as ``[t, n, d]``."""
        if self.mask is None:
            return x
        return x.new_zeros(*self.mask.shape, x.shape[-1]).index_put((self.mask,), x)

    def data(self, y: Tensor) -> Tensor:
        """Return ``y [t, n, d]`` packed again."""
        return y if self.mask is None else y[self.mask]


def _run(module: Any, records: Records, function: Any, x: Tensor, *args: Any) -> Any:
    """Return what torch's function for a recurrent layer returns, and record its products.

    Args:
        module: The layer.
        records: Takes the calls of its weights.
        function: A function of `CELLS`.
        x: The inputs ``[t, n, d]``, or ``[n, t, d]`` if ``batch_first``, or packed ``[., d]``.
        args: Its other arguments; those for packed sequences start with the sizes of batches.
    """
    sizes = args[0] if isinstance(args[0], Tensor) and not args[0].is_floating_point() else None
    if sizes is not None:
        args = (*args[1:], False)
    hx, parameters, _, layers, dropout, training, bidirectional, batch_first = args
    sequences = _Sequences() if sizes is None else _Sequences.packed(sizes, x.device)
    weights = _Weights(records, dict(zip(module._flat_weights_names, parameters)))
    y = sequences.padded(x.transpose(0, 1) if batch_first else x)  # t n d
    initial = hx if isinstance(hx, (tuple, list)) else (hx,)
    finals: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(1 + bidirectional):
            start = tuple(part[len(finals)] for part in initial)
            suffix = f"_l{layer}{'_reverse' * direction}"
            sweep = _Sweep(weights, suffix, CELLS[function.__name__], sequences)
            output, final = sweep.run(y, start)
            outputs.append(output)
            finals.append(final)
        y = torch.cat(outputs, -1)
        if dropout and training and layer < layers - 1:
            y = sequences.padded(functional.dropout(sequences.data(y), dropout))
    y = sequences.data(y)
    states = [torch.stack(parts) for parts in zip(*finals)]
    return (y.transpose(0, 1) if batch_first else y, *states)


@dataclass(frozen=True)
class _Sweep:
    """One layer in one direction.

    Args:
        weights: The products with all weights.
        suffix: How the names of its weights end.
        cell: Its equations.
        sequences: The lengths of the sequences.
    """

    weights: _Weights
    suffix: str
    cell: Cell
    sequences: _Sequences

    def run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the outputs ``[t, n, h]``, and the last state."""
        mask, is_reverse = self.sequences.mask, self.suffix.endswith("_reverse")
        by_example = None if mask is None else mask.T
        products = self._product("ih", x.transpose(0, 1), by_example).unbind(1)
        outputs: list[Tensor] = []
        order = range(len(products))
        for step in reversed(order) if is_reverse else order:
            state = self._next(products[step], state, None if mask is None else mask[step])
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if is_reverse else outputs), state

    def _next(self, product: Tensor, state: State, mask: Tensor | None) -> State:
        """Return the state after one step; sequences that have none keep theirs."""
        new = self.cell(product, self._product("hh", state[0], mask), state)
        if f"weight_hr{self.suffix}" in self.weights:
            new = (self._product("hr", new[0], mask), *new[1:])
        if mask is None:
            return new
        return tuple(torch.where(mask[:, None], one, other) for one, other in zip(new, state))

    def _product(self, kind: str, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.weights.product(f"weight_{kind}{self.suffix}", x, mask, self.sequences.ratio)


def _run_cell(
    module: Any,
    records: Records,
    function: Any,
    x: Tensor,
    hx: Tensor | Sequence[Tensor],
    *parameters: Tensor | None,
) -> Any:
    """Return what torch's function for a cell returns, and record its products."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights = _Weights(records, {n: p for n, p in zip(names, parameters) if p is not None})
    state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    cell = CELLS[function.__name__.removesuffix("_cell")]
    inputs = {"weight_ih": x, "weight_hh": state[0]}
    products = [weights.product(name, a, None, 1.0) for name, a in inputs.items()]
    found = cell(products[0], products[1], state)
    return found if len(found) > 1 else found[0]


LAYER_REPLACEMENTS = dict.fromkeys(CELLS, _run)
CELL_REPLACEMENTS = {f"{name}_cell": _run_cell for name in CELLS}
