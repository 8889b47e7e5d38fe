"""Attention: its projections as layers, against torch's forward pass and the GGN."""

from __future__ import annotations

import pytest
import torch
from ggn import loss_hessian
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from einconv_kfac.curvature import coverage, find_layers, kronecker_factors
from einconv_kfac.curvature.estimation.capture import LayerCapture

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}


class Attending(nn.Module):
    """Self-attention, or attention to shifted tokens, and a mean over positions."""

    def __init__(self, cross: bool = False, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(4, 2, **options)
        self.cross = cross

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(-1) if self.cross else x
        y: Tensor = self.attention(x, other, x + other if self.cross else x)[0]
        return y.mean(1 if self.attention.batch_first else 0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ggn(model: nn.Module, x: Tensor, names: tuple[str, ...]) -> Tensor:
    """The GGN block of parameters in torch's own forward pass, ``[p, p]``."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if name in names}
    rows = jacrev(lambda p: functional_call(model, p, x).flatten())(parameters)
    groups = 3 if "attention.in_proj_weight" in names else 1
    columns = [rows[name].reshape(len(rows[name]), groups, 4, -1) for name in names]
    flat = torch.cat(columns, -1).flatten(1)
    output = model(x)
    return flat.T @ loss_hessian(nn.MSELoss(), output, torch.zeros_like(output)) @ flat


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_diagonal_is_exact(cross: bool, bias: bool) -> None:
    model, x = Attending(cross, bias=bias, batch_first=True).double(), random(3, 5, 4)
    data = [(x, torch.zeros(3, 4, dtype=torch.float64))]
    factors = kronecker_factors(model, nn.MSELoss(), data, kind="diagonal", fisher="exact")
    assert set(factors) == {"attention", "attention.out_proj"}
    for block in factors.values():
        expected = ggn(model, x, block.parameters).diagonal()
        torch.testing.assert_close(block.values.flatten(), expected, **TOLERANCE)
    assert "forward" not in vars(model.attention)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_one_token_is_a_linear_network(approximation: str) -> None:
    model, x = Attending(batch_first=True).double(), random(5, 1, 4)
    data = [(x, torch.zeros(5, 4, dtype=torch.float64))]
    factors = kronecker_factors(
        model, nn.MSELoss(), data, approximation=approximation, fisher="exact"
    )
    for block in factors.values():
        dense = torch.block_diag(*block.to_dense())
        expected = ggn(model, x, block.parameters)
        torch.testing.assert_close(dense, expected, **TOLERANCE)


MASK = torch.ones(5, 5).tril() == 0
PADDING = torch.arange(5) >= torch.tensor([[5], [3], [4]])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": MASK, "is_causal": True},
        {"attn_mask": MASK.double() * -2, "key_padding_mask": PADDING.double() * -3},
        {"attn_mask": MASK.expand(6, 5, 5), "key_padding_mask": PADDING},
    ],
    ids=str,
)
def test_watched_forward_pass_equals_torchs(options: dict[str, object], batch_first: bool) -> None:
    model = Attending(batch_first=batch_first).double()
    x = random(3, 5, 4) if batch_first else random(5, 3, 4)
    expected, weights = model.attention(x, x, x, **options)
    with LayerCapture(find_layers(model, every=True)) as capture:
        got, own_weights = model.attention(x, x, x, **options)
        assert len(capture.take()) == 2
    torch.testing.assert_close(got, expected, **TOLERANCE)
    if options.get("need_weights", True):
        torch.testing.assert_close(own_weights, weights, **TOLERANCE)
    else:
        assert own_weights is None


def test_transformer_encoder_is_covered() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(7, 4), nn.TransformerEncoder(layer, 2), nn.Linear(4, 7))
    assert not coverage(model).gaps()
    assert [found.name for found in find_layers(model)][:2] == ["0", "1.layers.0.linear1"]


def test_what_is_refused() -> None:
    model = Attending(add_bias_kv=True)
    (row,) = [r for r in coverage(model) if r.parameter == "attention.in_proj_weight"]
    assert "bias_k or add_zero_attn" in row.reason
    assert not find_layers(model, every=True)
    cross = nn.MultiheadAttention(4, 2, kdim=3)
    assert "not a parameter of its own" in coverage(cross)[0].reason
    plain = nn.MultiheadAttention(4, 2)
    with (
        LayerCapture(find_layers(plain, every=True)),
        pytest.raises(ValueError, match="of one length"),
    ):
        plain(torch.ones(3, 2, 4), torch.ones(5, 2, 4), torch.ones(5, 2, 4))
    assert "forward" not in vars(plain)
