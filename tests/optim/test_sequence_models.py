"""Attention and recurrent layers in training: weights have factors, and batches are replayed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from einconv_kfac.optim import KFAC


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, **options)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).mean(1))


class Crossed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        key, value = x[:, 2:, : self.first.kdim], x[:, 2:, : self.first.vdim]
        return self.last(self.first(x, key, value)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], *, packed: bool = False, **options: Any) -> None:
        super().__init__()
        self.first, self.packed = kind(8, 8, batch_first=True, **options), packed
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        given: Any = x
        if self.packed:
            lengths = torch.arange(len(x)) % x.shape[1] + 1
            given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, state = self.first(given)
        return self.last((state[0] if isinstance(state, tuple) else state)[-1])


MODELS = {
    "encoder": lambda: Encoder(dropout=0.0),
    "encoder with dropout": lambda: Encoder(dropout=0.2),
    "encoder, norm first": lambda: Encoder(dropout=0.1, norm_first=True),
    "fewer keys": lambda: Crossed(dropout=0.1),
    "other features": lambda: Crossed(kdim=3, vdim=5),
    "lstm": lambda: Recurrent(nn.LSTM),
    "lstm with dropout": lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.2),
    "gru": lambda: Recurrent(nn.GRU, bias=False),
    "rnn": lambda: Recurrent(nn.RNN, bidirectional=True),
    "packed lstm": lambda: Recurrent(nn.LSTM, packed=True),
}


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(24, 6, 8, generator=torch.Generator().manual_seed(0))
    return x, x[:, 0, 0].gt(0).long()


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_all_weights_are_preconditioned(name: str, adaptive: bool) -> None:
    torch.manual_seed(0)
    model, loss_fn, (x, y) = MODELS[name](), nn.CrossEntropyLoss(), batch()
    options: dict[str, Any] = {} if adaptive else {"adaptive": False, "lr": 0.05}
    opt = KFAC(model, loss_fn, factor_update_period=2, inverse_update_period=2, **options)
    assert set(opt.coverage().values()) == {"kfac"}
    losses = []
    for _ in range(3):
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(copied.first).keys() == vars(MODELS[name]().first).keys()
        copied(x)
    opt.remove_hooks()
    modules = list(model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("name", MODELS)
def test_recording_does_not_change_the_training_pass(name: str) -> None:
    """Gradients and the numbers drawn are those without an optimizer."""
    torch.manual_seed(0)
    model, loss_fn, (x, y) = MODELS[name]().double(), nn.CrossEntropyLoss(), batch()
    results = []
    for watched in (False, True):
        opt = KFAC(model, loss_fn) if watched else None
        torch.manual_seed(1)
        model.zero_grad()
        loss_fn(model(x.double()), y).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        results.append([*gradients, torch.rand(2)])
        del opt
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
