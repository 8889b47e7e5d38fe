"""Every type of layer against the GGN by definition, and against a rule's own parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from ggn import dense_ggn
from torch import Tensor, nn

from einconv_kfac.curvature import (
    LayerRule,
    LinearRule,
    find_layers,
    kronecker_factors,
    register_layer,
)
from einconv_kfac.curvature.estimation.capture import LayerCapture

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}


class Mean(nn.Module):
    """Mean over positions, where there are any."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x
        return x.flatten(1, -2).mean(1) if self.last else x.flatten(2).mean(2)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


TOKENS = torch.tensor([[0, 3, 1], [2, 2, 0], [4, 1, 1]])
Build = Callable[[], nn.Module]
CASES: list[tuple[str, Build, Tensor, bool]] = [
    (
        "conv-transpose1d",
        lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2),
        random(3, 4, 5),
        False,
    ),
    (
        "conv-transpose1d-dilated",
        lambda: nn.ConvTranspose1d(2, 3, 4, 3, dilation=2),
        random(3, 2, 4),
        False,
    ),
    (
        "conv-transpose2d",
        lambda: nn.ConvTranspose2d(3, 2, (2, 3), 2, (0, 1)),
        random(3, 3, 4, 3),
        False,
    ),
    (
        "conv-transpose2d-mixed",
        lambda: nn.ConvTranspose2d(4, 4, 3, (1, 2), (2, 1), (0, 1), 4, False),
        random(3, 4, 3, 4),
        False,
    ),
    (
        "conv-transpose3d",
        lambda: nn.ConvTranspose3d(2, 4, 2, 2, groups=2),
        random(2, 2, 2, 3, 2),
        False,
    ),
    ("embedding", lambda: nn.Embedding(5, 3), TOKENS, True),
    ("embedding-padded", lambda: nn.Embedding(5, 3, padding_idx=1), TOKENS, True),
    ("embedding-flat", lambda: nn.Embedding(5, 3), TOKENS[:, 0], True),
    ("batch-norm", lambda: nn.BatchNorm1d(4), random(5, 4), False),
    ("batch-norm2d", lambda: nn.BatchNorm2d(4), random(5, 4, 3, 2), False),
    ("batch-norm-eval", lambda: nn.BatchNorm2d(4).eval(), random(5, 4, 3, 2), False),
    (
        "batch-norm-untracked",
        lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(),
        random(5, 4, 3),
        False,
    ),
    ("instance-norm", lambda: nn.InstanceNorm2d(4, affine=True), random(3, 4, 3, 2), False),
    (
        "instance-norm-eval",
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(),
        random(3, 4, 3),
        False,
    ),
    ("group-norm", lambda: nn.GroupNorm(2, 4), random(3, 4, 3), False),
    ("layer-norm", lambda: nn.LayerNorm(4), random(3, 2, 4), True),
    ("layer-norm-many", lambda: nn.LayerNorm((2, 3)), random(4, 2, 3), True),
    ("rms-norm", lambda: nn.RMSNorm(4), random(3, 2, 4), True),
]


def model_of(build: Build, last: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = build().double()
    for name, buffer in layer.named_buffers():
        if name == "running_var":
            buffer.uniform_(0.5, 2)
    many = isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1
    return nn.Sequential(layer, nn.Flatten() if many else Mean(last))


def check(model: nn.Module, x: Tensor, approximation: str) -> None:
    y = torch.zeros_like(model(x))
    factors = kronecker_factors(
        model, nn.MSELoss(), [(x, y)], fisher="exact", approximation=approximation
    )
    assert list(factors) == ["0"]
    expected = dense_ggn(model, nn.MSELoss(), x, y, "0")
    torch.testing.assert_close(factors["0"].to_dense(), expected, **TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_average_over_positions(case: tuple[str, Build, Tensor, bool]) -> None:
    _, build, x, last = case
    model = model_of(build, last)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    check(model, x, "reduce")
    layer = find_layers(model, every=True)[0]
    if layer.rule.positions(layer.module, model[0](x).shape) == 1:
        check(model, x, "expand")
    if not layer.module.training:
        assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_output_size_of_a_transposed_convolution() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 3, 2, stride=3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.up(x, output_size=[12]).mean(2)
            return result

    model, x = Up().double(), random(3, 2, 4)
    y = torch.zeros(3, 3, dtype=torch.float64)
    factors = kronecker_factors(
        model, nn.MSELoss(), [(x, y)], fisher="exact", approximation="reduce"
    )
    expected = dense_ggn(model, nn.MSELoss(), x, y, "up")
    torch.testing.assert_close(factors["up"].to_dense(), expected, **TOLERANCE)


MORE: list[tuple[str, Build, Tensor, bool]] = [
    ("linear", lambda: nn.Linear(4, 3), random(3, 2, 2, 4), True),
    ("conv", lambda: nn.Conv2d(4, 6, (3, 2), 2, (1, 0), 2, 2), random(3, 4, 6, 5), False),
    (
        "conv-circular",
        lambda: nn.Conv1d(4, 2, 3, padding=2, padding_mode="circular"),
        random(3, 4, 5),
        False,
    ),
]


@pytest.mark.parametrize("case", [*MORE, *CASES], ids=lambda case: case[0])
def test_rules_agree_with_their_parts(case: tuple[str, Build, Tensor, bool]) -> None:
    """``W a + b`` is the output, and the factors are the products of the columns."""
    _, build, x, last = case
    model = model_of(build, last)
    (layer,) = find_layers(model, every=True)
    with LayerCapture([layer]) as capture:
        y = model[0](x)
        (call,) = capture.take()
    rule, module, bias = layer.rule, layer.module, layer.bias is not None
    a, g = rule.inputs(module, call.x, y.shape), rule.outputs(module, y.detach())
    matrix = layer.to_matrix(dict(model.named_parameters())).detach()
    weight, shift = (matrix[..., :-1], matrix[..., -1:]) if bias else (matrix, torch.zeros(()))
    if getattr(module, "padding_idx", None) is None:
        torch.testing.assert_close(weight @ a + shift, g, **TOLERANCE)
    for approximation in ("expand", "reduce"):
        torch.testing.assert_close(
            rule.input_factor(module, call.x, y.shape, approximation, bias),
            LayerRule.input_factor(rule, module, call.x, y.shape, approximation, bias),
            **TOLERANCE,
        )
        torch.testing.assert_close(
            rule.output_factor(module, y.detach(), approximation),
            LayerRule.output_factor(rule, module, y.detach(), approximation),
            **TOLERANCE,
        )
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    back = layer.from_matrix(layer.to_matrix(tensors))
    assert all(torch.equal(back[name], tensors[name]) for name in layer.parameters)


def test_a_layer_of_ones_own() -> None:
    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 2)

    class HalvedRule(LinearRule):
        def inputs(self, module: nn.Module, x: Tensor, y_shape: Sequence[int]) -> Tensor:
            return super().inputs(module, x / 2, y_shape)

        input_factor = LayerRule.input_factor

    register_layer(Halved, HalvedRule())
    check(nn.Sequential(Halved(3, 2).double()), random(4, 3), "expand")
