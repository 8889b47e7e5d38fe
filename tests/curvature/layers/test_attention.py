"""Attention: its projections as layers, against torch's forward pass and the GGN."""

from __future__ import annotations

import copy
import pickle

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


class Between(nn.Module):
    """Attention of some tokens to others, with features of their own, in plain operations.

    The outputs of the projections can be shifted, so that derivatives with respect to the shifts
    are those with respect to the outputs.
    """

    def __init__(self, queries: int, keys: int, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(4, 2, **{"batch_first": True, **options})
        self.queries, self.keys = queries, keys

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.attention
        query, key = x[:, : self.queries, :4], x[:, -self.keys :, : own.kdim]
        return query, key, x[:, -self.keys :, -own.vdim :]

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.inputs(x)
        if self.attention.batch_first:
            return self.attention(*inputs)[0].sin().sum(1)
        return self.attention(*(part.transpose(0, 1) for part in inputs))[0].sin().sum(0)

    def weights(self) -> list[Tensor]:
        own = self.attention
        if own.in_proj_weight is not None:
            return list(own.in_proj_weight.detach().chunk(3))
        found = own.q_proj_weight, own.k_proj_weight, own.v_proj_weight
        return [weight.detach() for weight in found]

    def shifted(self, x: Tensor, shifts: list[Tensor]) -> Tensor:
        """The output for one example ``[1, l, d]``."""
        own, inputs = self.attention, self.inputs(x)
        bias = own.in_proj_bias
        biases = torch.zeros(3, 4, dtype=x.dtype) if bias is None else bias.detach().view(3, 4)
        parts = [
            (a @ w.T + b + shift).unflatten(-1, (2, 2)).transpose(1, 2)
            for a, w, b, shift in zip(inputs, self.weights(), biases, shifts)
        ]
        q, k, v = parts
        y = ((q @ k.mT * 2**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return nn.functional.linear(y, own.out_proj.weight, own.out_proj.bias).sin().sum(1)


def expanded(model: Between, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """``A`` and ``B`` of the projections by definition, for half the sum of squared outputs."""
    inputs = model.inputs(x)
    shifts = [torch.zeros(1, part.shape[1], 4, dtype=x.dtype) for part in inputs]
    factors = []
    for group, part in enumerate(inputs):
        a = torch.cat([part, torch.ones_like(part[..., :1])], -1).flatten(0, 1)
        b = torch.zeros(4, 4, dtype=x.dtype)
        for example in x.split(1):

            def output(shift: Tensor, example: Tensor = example, group: int = group) -> Tensor:
                own = [shift if g == group else zero for g, zero in enumerate(shifts)]
                return model.shifted(example, own)[0]

            g = jacrev(output)(shifts[group])  # c 1 s co
            b += torch.einsum("ctsi,ctsj->ij", g, g)
        factors.append((a.T @ a / len(x), b / (len(x) * part.shape[1])))
    return factors


LENGTHS = [(5, 5), (2, 5), (5, 3)]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_other_numbers_of_keys(queries: int, keys: int, batch_first: bool) -> None:
    model = Between(queries, keys, batch_first=batch_first).double()
    x = random(3, 5, 4)
    data, expected = [(x, torch.zeros(3, 4, dtype=torch.float64))], expanded(model, x)
    block = kronecker_factors(model, nn.MSELoss(reduction="sum"), data, fisher="exact")["attention"]
    for dense, (a, b) in zip(block.to_dense(), expected):
        torch.testing.assert_close(dense, 2 * len(x) * torch.kron(b, a), **TOLERANCE)


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("bias", [True, False])
def test_other_numbers_of_features(bias: bool, queries: int, keys: int) -> None:
    model, x = Between(queries, keys, kdim=3, vdim=2, bias=bias).double(), random(3, 5, 4)
    data, expected = [(x, torch.zeros(3, 4, dtype=torch.float64))], expanded(model, x)
    factors = kronecker_factors(model, nn.MSELoss(reduction="sum"), data, fisher="exact")
    for name, (a, b) in zip(("q_proj", "k_proj", "v_proj"), expected):
        (dense,) = factors[f"attention.{name}_weight"].to_dense()
        wanted = 2 * len(x) * torch.kron(b, a[:-1, :-1])
        torch.testing.assert_close(dense, wanted, **TOLERANCE)
    if bias:
        blocks = factors["attention.in_proj_bias"].to_dense()
        for dense, (a, b) in zip(blocks, expected):
            torch.testing.assert_close(dense, 2 * len(x) * a[-1, -1] * b, **TOLERANCE)
    assert ("attention.in_proj_bias" in factors) == bias


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 2}], ids=str)
def test_diagonals_with_other_numbers(options: dict[str, int], queries: int, keys: int) -> None:
    model, x = Between(queries, keys, **options).double(), random(3, 5, 4)
    own = {name: p.detach() for name, p in model.named_parameters()}
    rows = jacrev(lambda p: functional_call(model, p, x).flatten())(own)
    data = [(x, torch.zeros(3, 4, dtype=torch.float64))]
    loss_fn = nn.MSELoss(reduction="sum")
    factors = kronecker_factors(model, loss_fn, data, kind="diagonal", fisher="exact")
    covered = set()
    for layer in find_layers(model):
        found = layer.from_matrix(factors[layer.name].values)
        for name in layer.parameters:
            torch.testing.assert_close(found[name], 2 * rows[name].square().sum(0), **TOLERANCE)
            covered.add(name)
    assert covered == own.keys()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 3, "vdim": 2},
        {"kdim": 3, "vdim": 2, "bias": False, "add_bias_kv": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_batch", [True, False])
def test_recorded_passes_draw_the_same_numbers(
    options: dict[str, object], need_weights: bool, is_batch: bool
) -> None:
    """Also the gradients are those of torch's own forward pass, with dropout."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, dropout=0.5, **options).double()
    inputs = (random(5, 3, 4), random(6, 3, module.kdim), random(6, 3, module.vdim))
    given = inputs if is_batch else [part[:, 0] for part in inputs]
    results = []
    for layers in ([], find_layers(module)):
        with LayerCapture(layers):
            torch.manual_seed(1)
            y, weights = module(*given, need_weights=need_weights)
            gradients = torch.autograd.grad(y.sin().sum(), list(module.parameters()))
            results.append([y, *gradients, torch.rand(3)] + [weights] * need_weights)
    torch.testing.assert_close(*results, **TOLERANCE)


def test_copies_are_plain_modules() -> None:
    model = Attending()
    with LayerCapture(find_layers(model)) as capture:
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            copied(torch.ones(5, 3, 4))
            assert not capture.calls
            assert vars(copied.attention).keys() == vars(Attending().attention).keys()
    assert not model.attention._forward_hooks
    assert not model.attention._forward_pre_hooks


def test_errors_end_the_recording() -> None:
    module = nn.MultiheadAttention(4, 2)
    x = torch.ones(5, 3, 4)
    with LayerCapture(find_layers(module)) as capture:
        with pytest.raises(AssertionError, match="embedding dimension"):
            module(x[..., :2], x[..., :2], x[..., :2])
        assert not torch.overrides._get_current_function_mode_stack()
        module(x, x, x)
        assert [call.layer for call in capture.calls] == ["", "out_proj"]
    assert not torch.overrides._get_current_function_mode_stack()


def test_interrupted_calls_record_no_others() -> None:
    first, second, x = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2), torch.ones(5, 3, 4)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with LayerCapture(find_layers(first)) as capture:
        handle = first.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            first(x, x, x)
        handle.remove()
        second(x, x, x)
        assert not capture.calls
        first(x, x, x)
        assert [call.layer for call in capture.calls] == ["", "out_proj"]
        assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("frozen", ["in_proj_weight", "out_proj.weight"])
def test_one_projection_alone(frozen: str) -> None:
    module = nn.MultiheadAttention(4, 2)
    module.get_parameter(frozen).requires_grad_(False)
    (layer,) = find_layers(module)
    x = torch.ones(5, 3, 4)
    with LayerCapture([layer]) as capture:
        module(x, x, x)
        assert [call.layer for call in capture.calls] == [layer.name]


def test_transformer_encoder_is_covered() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(7, 4), nn.TransformerEncoder(layer, 2), nn.Linear(4, 7))
    assert not coverage(model).gaps()
    names = [found.name for found in find_layers(model)]
    assert "1.layers.0.self_attn" in names
    assert "1.layers.1.self_attn.out_proj" in names


def test_additional_keys_and_values_have_no_block() -> None:
    gaps = coverage(nn.MultiheadAttention(4, 2, add_bias_kv=True)).gaps()
    assert [row.parameter for row in gaps] == ["bias_k", "bias_v"]


class Changed(nn.MultiheadAttention):
    def forward(self, *args: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
        return super().forward(*args, **options)


def test_another_forward_pass_is_refused() -> None:
    assert not find_layers(Changed(4, 2))
