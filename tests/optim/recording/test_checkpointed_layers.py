"""Layers that torch runs as one function, inside of checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from einconv_kfac import KFAC, kronecker_factors

MODULES: dict[str, Any] = {
    "gru": lambda: nn.GRU(3, 6, batch_first=True),
    "lstm": lambda: nn.LSTM(3, 5, proj_size=3, bidirectional=True, batch_first=True),
    "rnn": lambda: nn.RNN(3, 6, nonlinearity="relu", batch_first=True),
    "packed": lambda: nn.LSTM(3, 6, batch_first=True),
    "cell": lambda: nn.GRUCell(3, 6),
    "attention": lambda: nn.MultiheadAttention(6, 2, kdim=3, vdim=3, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
}


class Net(nn.Module):
    """A classifier of sequences, whose main part may be checkpointed."""

    def __init__(self, name: str, is_checkpointed: bool) -> None:
        super().__init__()
        self.name, self.is_checkpointed = name, is_checkpointed
        self.part, self.last = MODULES[name](), nn.Linear(6, 4)
        self.first = nn.Linear(3, 6) if name in {"cell", "attention", "encoder"} else nn.Identity()

    def features(self, x: Tensor) -> Tensor:
        """The features of sequences ``[n, t, 3]``, ``[n, 6]``."""
        if self.name == "cell":
            h = self.first(x[:, 0])
            for step in range(x.shape[1]):
                h = self.part(x[:, step], h)
            return h
        if self.name == "packed":
            lengths = torch.tensor([4, 4, 3, 3, 2, 2, 1, 1])
            packed = self.part(pack_padded_sequence(x, lengths, batch_first=True))[0]
            return pad_packed_sequence(packed, batch_first=True)[0].mean(1)
        if self.name == "attention":
            return self.part(self.first(x), x, x, need_weights=False)[0].mean(1)
        if self.name == "encoder":
            return self.part(self.first(x)).mean(1)
        return self.part(x)[0][:, -1]

    def forward(self, x: Tensor) -> Tensor:
        if self.is_checkpointed:
            return self.last(checkpoint(self.features, x, use_reentrant=False))
        return self.last(self.features(x))


def trained(name: str, is_checkpointed: bool, **options: Any) -> Tensor:
    torch.manual_seed(0)
    model, loss_fn = Net(name, is_checkpointed).double(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, fisher="exact", **options)
    for step in range(3):
        x = torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(step)).double()
        opt.zero_grad()
        loss_fn(model(x), torch.arange(8) % 4).backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


FIXED = {"adaptive": False, "lr": 0.1, "factor_update_period": 2}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, FIXED) for name in MODULES),
    *((name, {}) for name in ("packed", "cell", "attention")),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_steps_are_those_without_checkpoints(name: str, options: dict[str, Any]) -> None:
    expected = trained(name, False, **options)
    torch.testing.assert_close(trained(name, True, **options), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["gru", "cell"])
def test_factors_are_those_without_checkpoints(name: str) -> None:
    torch.manual_seed(0)
    plain, model = Net(name, False).double(), Net(name, True).double()
    model.load_state_dict(plain.state_dict())
    data = [(torch.randn(8, 4, 3).double(), torch.arange(8) % 4)]
    expected, found = (
        kronecker_factors(own, nn.CrossEntropyLoss(), data, fisher="exact")
        for own in (plain, model)
    )
    assert found.keys() == expected.keys()
    for layer, like in expected.items():
        torch.testing.assert_close(found[layer].to_dense(), like.to_dense(), rtol=1e-12, atol=1e-14)
