"""Where K-FAC is exact, its blocks equal those of the GGN by definition, in float64."""

from __future__ import annotations

import pytest
import torch
from cases import CONV_CASES, ConvCase, case_id
from ggn import dense_empirical, dense_ggn
from torch import Tensor, nn

from einconv_kfac.curvature import kronecker_factors

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class AveragePositions(nn.Module):
    """Mean over all dimensions but the batch and the channels."""

    def __init__(self, channels_last: bool = False) -> None:
        super().__init__()
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1) if self.channels_last else x.flatten(2).mean(2)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def check(model: nn.Module, x: Tensor, approximation: str, reduction: str = "mean") -> None:
    """Compare all blocks of a model with squared error, whose GGN needs no target."""
    model = model.double()
    loss_fn = nn.MSELoss(reduction=reduction)
    y = random(*model(x).shape, seed=1)
    factors = kronecker_factors(
        model, loss_fn, [(x, y)], fisher="exact", approximation=approximation
    )
    assert factors
    for name, block in factors.items():
        expected = dense_ggn(model, loss_fn, x, y, name)
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(block.to_dense(), expected, **TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
def test_deep_linear_network(reduction: str, bias: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4, bias=bias), nn.Linear(4, 3, bias=bias), nn.Linear(3, 2, bias=bias)]
    check(nn.Sequential(*layers), random(6, 5), "expand", reduction)
    check(nn.Sequential(*layers), random(6, 5), "reduce", reduction)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_one_layer_with_cross_entropy_and_one_example(approximation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    x, y, loss_fn = random(1, 5), torch.tensor([2]), nn.CrossEntropyLoss()
    for fisher, oracle in (("exact", dense_ggn), ("empirical", dense_empirical)):
        factors = kronecker_factors(
            model, loss_fn, [(x, y)], fisher=fisher, approximation=approximation
        )
        for name, block in factors.items():
            expected = oracle(model, loss_fn, x, y, name)
            torch.testing.assert_close(block.to_dense(), expected, **TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
def test_average_over_positions_of_linear_layers(reduction: str, bias: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3, bias=bias), nn.Linear(3, 2, bias=bias), AveragePositions(True)]
    check(nn.Sequential(*layers), random(3, 2, 3, 4), "reduce", reduction)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CONV_CASES, ids=case_id)
def test_average_over_positions_of_convolutions(case: ConvCase, bias: bool) -> None:
    torch.manual_seed(0)
    conv = CONV[len(case.input_size)](
        case.in_channels, case.out_channels, case.kernel_size, **case.options, bias=bias
    )
    check(nn.Sequential(conv, AveragePositions()), case.input(), "reduce")


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3,), {"padding": 1}),
        ((4,), {"padding": "same"}),
        ((3, 2), {"padding": (2, 1), "stride": (1, 2), "groups": 2}),
        ((2, 3), {"padding": "same", "dilation": (1, 2), "groups": 4}),
        ((2, 1, 3), {"padding": (1, 0, 2)}),
    ],
    ids=str,
)
def test_padding_modes(mode: str, kernel: tuple[int, ...], options: dict[str, object]) -> None:
    torch.manual_seed(0)
    conv = CONV[len(kernel)](4, 4, kernel, padding_mode=mode, **options)
    check(
        nn.Sequential(conv, AveragePositions()), random(2, 4, *(5, 6, 4)[: len(kernel)]), "reduce"
    )


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "case",
    [case for case in CONV_CASES if set(case.geometry.output_size) == {1}]
    + [
        ConvCase("1d-grouped", 4, 6, (5,), (5,), {"groups": 2}),
        ConvCase("2d-dilated-grouped", 4, 2, (5, 3), (3, 2), {"dilation": 2, "groups": 2}),
        ConvCase("2d-depthwise", 3, 6, (3, 3), (3, 3), {"groups": 3}),
        ConvCase("3d-grouped", 4, 4, (2, 2, 2), (2, 2, 2), {"groups": 2}),
    ],
    ids=case_id,
)
def test_kernel_that_covers_its_input(case: ConvCase, approximation: str, bias: bool) -> None:
    torch.manual_seed(0)
    conv = CONV[len(case.input_size)](
        case.in_channels, case.out_channels, case.kernel_size, **case.options, bias=bias
    )
    head = nn.Linear(case.out_channels, 3)
    check(nn.Sequential(conv, nn.Flatten(), head), case.input(), approximation)


def test_module_called_twice_is_exact_for_reduce() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 4, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.conv(x[..., :4]), self.conv(x[..., 3:])
            return (first.sum(2) + second.sum(2)) / 7

    torch.manual_seed(0)
    check(Twice(), random(3, 3, 13), "reduce")
