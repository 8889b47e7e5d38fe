"""Detection of processors, and factors as computed on each kind of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from factor_definition import columns, factor
from processors import PROCESSORS, simulated

from einconv_kfac.curvature.devices import processor
from einconv_kfac.curvature.devices.device_registry import PROFILES, profile_of
from einconv_kfac.curvature.devices.processor import AMD, INTEL, Processor, detected, parsed
from einconv_kfac.curvature.factors import conv_input_factor, explain
from einconv_kfac.curvature.factors.choice import applicable, choose
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.geometry import Axis, Geometry

CPUINFO = "processor : 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t: 1\n"

SAME = (Axis(9, 3, 1, (1, 1)), Axis(8, 3, 1, (1, 1)))
CASES = {
    "strided": (Geometry((Axis(11, 3, 2, (1, 1)), Axis(10, 5, 1, (2, 0), 2))), 3, 3),
    "wide": (Geometry(SAME), 4, 64),  # products that are large enough for oneDNN
    "grouped": (Geometry(SAME, 3), 2, 2),
    "line": (Geometry((Axis(20, 5, 1, (2, 2)),)), 4, 2),
    "small": (Geometry((Axis(4, 3, 1, (1, 1)), Axis(4, 3, 1, (1, 1)))), 3, 8),
    "pointwise": (Geometry((Axis(12, 1), Axis(12, 1))), 4, 96),
}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CPUINFO.format(AMD, 25), Processor(AMD, 25, 512)),
        (CPUINFO.format(INTEL, 6), Processor(INTEL, 6, 512)),
        ("Features : fp asimd\nCPU implementer : 0x41\n", Processor("", 0, 512)),
        ("", Processor("", 0, 512)),
    ],
)
def test_cpuinfo_is_parsed(text: str, expected: Processor) -> None:
    assert parsed(text, 512) == expected


@pytest.mark.parametrize(
    ("capability", "bits"), [("AVX512", 512), ("AVX2", 256), ("DEFAULT", 128), ("SVE256", 128)]
)
def test_detection(
    capability: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert detected() == Processor("", 0, bits)
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(AMD, 26))
    assert detected() == Processor(AMD, 26, bits)


def test_kinds_differ_where_they_should() -> None:
    narrow = {kind for kind, found in PROCESSORS.items() if found.mkl_is_narrow}
    assert narrow == {"amd-avx512-double-pumped", "amd-avx512"}
    pumped = {kind for kind, found in PROCESSORS.items() if found.is_double_pumped}
    assert pumped == {"amd-avx512-double-pumped", "no-avx512"}


def drawn(case: str) -> torch.Tensor:
    """An input."""
    geometry, batch, channels = CASES[case]
    shape = (batch, geometry.groups * channels, *geometry.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@cache
def reference(case: str) -> torch.Tensor:
    """The factor of an input by its definition."""
    return factor(columns(drawn(case).double(), CASES[case][0]), "expand")


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_factors_on_each_processor(kind: str, case: str) -> None:
    """Every applicable algorithm is right and symmetric, and one of them is chosen."""
    geometry, batch, channels = CASES[case]
    names = ("kernel_size", "stride", "padding", "dilation", "groups")
    options: dict[str, Any] = {name: getattr(geometry, name) for name in names}
    x = drawn(case)
    shape = tuple(x.shape)
    expected = reference(case)
    problem = Problem(geometry, batch, channels, torch.float32, "cpu")
    with simulated(kind):
        assert choose(problem) in applicable(problem)
        assert explain(shape, **options).splitlines()[1].split()[0] == choose(problem)
        for algorithm in (*applicable(problem), None):
            found = conv_input_factor(x, **options, algorithm=algorithm)
            assert torch.equal(found, found.mT)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_devices_without_a_profile_take_no_path_of_another() -> None:
    """Products in mixed precision, TF32 and Triton are CUDA's alone."""
    assert set(PROFILES) == {"cpu", "cuda"}
    cuda, other = profile_of("cuda"), profile_of("mps")
    assert other.prices == cuda.prices
    assert cuda.runs_triton
    assert cuda.tf32_mac_price < 1
    assert not other.runs_triton
    assert not other.has_mixed_products
    assert other.tf32_mac_price == other.mixed_mac_price == 1
