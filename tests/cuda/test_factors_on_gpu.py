"""Factors on a GPU against the processor's in float64, with TF32 on and off."""

from __future__ import annotations

import pytest
import torch
from cases import CONV_CASES, ConvCase, case_id
from factor_definition import columns, factor
from gpu_cases import DEVICE, NEEDS_DEVICE, NEEDS_GPU, ON_GPU, batches, network
from torch import nn

from einconv_kfac.curvature import conv_input_factor, kronecker_factors
from einconv_kfac.curvature.factors.choice import applicable
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.geometry import conv_geometry
from einconv_kfac.modules import ConvNd, ConvTransposeNd

pytestmark = NEEDS_DEVICE
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
TF32_BOUND = 3e-3
LARGE = (  # channels, groups, size, kernel, stride, padding: of real networks
    (3, 1, 224, 7, 2, 3),
    (64, 1, 56, 3, 1, 1),
    (512, 1, 7, 3, 1, 1),
    (128, 1, 56, 3, 2, 1),
    (144, 144, 56, 3, 1, 1),
    (128, 32, 28, 3, 1, 1),
    (256, 1, 14, 1, 1, 0),
)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("case", CONV_CASES, ids=case_id)
def test_factors_are_those_of_the_definition(case: ConvCase, dtype: torch.dtype) -> None:
    x = case.input().to(dtype)
    expected = factor(columns(x.double(), case.geometry), "expand", bias=True)
    channels = case.in_channels // case.groups
    problem = Problem(case.geometry, case.batch, channels, dtype, DEVICE.type)
    for name in applicable(problem):
        shape = expected.shape
        out = torch.full(
            shape, float("nan"), device=DEVICE, dtype=torch.promote_types(dtype, torch.float32)
        )
        found = conv_input_factor(
            x.to(DEVICE), case.kernel_size, **case.options, bias=True, algorithm=name, out=out
        ).cpu()
        assert torch.equal(found, found.mT), name
        error = (found.double() - expected).norm() / expected.norm()
        assert error < BOUNDS[dtype], (name, float(error))


@pytest.mark.parametrize("precision", ["full", "tf32", "bfloat16"])
@pytest.mark.parametrize("layer", LARGE, ids=str)
def test_factors_of_real_layers(layer: tuple[int, ...], precision: str) -> None:
    """They are as exact as the precision, symmetric, and positive semi-definite."""
    channels, groups, size, kernel, stride, padding = layer
    geometry = conv_geometry((size, size), kernel, stride, padding, groups=groups)
    batch = 8 if ON_GPU else 1
    x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
    given = x.bfloat16() if precision == "bfloat16" else x
    options = {"stride": stride, "padding": padding, "groups": groups}
    expected = conv_input_factor(given.double(), kernel, **options, algorithm="im2col")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    problem = Problem(geometry, batch, channels // groups, given.dtype, DEVICE.type)
    names = applicable(problem) if ON_GPU else (None,)
    for name in names:
        found = conv_input_factor(given.to(DEVICE), kernel, **options, algorithm=name).cpu()
        assert torch.equal(found, found.mT), name
        error = (found.double() - expected).norm() / expected.norm()
        assert error < (TF32_BOUND if precision == "tf32" else 1e-5), (name, float(error))
        if found.shape[-1] <= 1200:
            values = torch.linalg.eigvalsh(found.double())
            assert bool((values >= -1e-5 * values.amax(-1, keepdim=True)).all()), name


@NEEDS_GPU
def test_nothing_waits() -> None:
    x = torch.randn(4, 8, 9, 9, device=DEVICE)
    problem = Problem(conv_geometry((9, 9), 3, 1, 1), 4, 8, torch.float32, DEVICE.type)
    names = applicable(problem)
    conv_input_factor(x, 3, padding=1)  # the first call loads libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in names:
            conv_input_factor(x, 3, padding=1, algorithm=name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_curvature(fisher: str, kind: str) -> None:
    data, loss_fn, model = batches(2, torch.float64), nn.CrossEntropyLoss(), network(torch.float64)
    here = kronecker_factors(model, loss_fn, data, fisher=fisher, kind=kind)
    moved = [(x.to(DEVICE), y.to(DEVICE)) for x, y in data]
    there = kronecker_factors(model.to(DEVICE), loss_fn, moved, fisher=fisher, kind=kind)
    if fisher != "mc":  # its generator is another one on each device
        torch.testing.assert_close(there.trace().cpu(), here.trace(), rtol=1e-9, atol=0)
    for value in (there.logdet(0.1), there.inverse(0.1).trace()):
        assert bool(value.isfinite())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [ConvNd, ConvTransposeNd])
def test_convolutions(kind: type[ConvNd], n: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = kind(n, 4, 6, 3, padding=1, stride=2, groups=groups).double()
    x = torch.randn(2, 4, *[4] * n, dtype=torch.float64)
    outputs, gradients = [], []
    for device in (torch.device("cpu"), DEVICE):
        layer.zero_grad()
        layer.to(device)
        y = layer(x.to(device))
        y.square().sum().backward()
        outputs.append(y.detach().cpu())
        gradients.append([p.grad.cpu() for p in layer.parameters() if p.grad is not None])
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])
