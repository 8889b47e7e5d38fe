"""The fused kernel: exact in Triton's interpreter, and compiled for GPUs, without a GPU.

Each check is a process of its own, since Triton decides on import whether it interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from einconv_kfac.curvature import conv_input_factor
from einconv_kfac.curvature.factors.choice import ALGORITHMS, applicable, choose
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.geometry import conv_geometry

HERE = Path(__file__).parent
FIRST_TRITON = (3, 6)
"""What the extra `gpu` asks for."""
FIRST_NUMPY_WITHOUT_INTERPRETER = (2, 4)
GEOMETRIES = int(os.environ.get("EK_GEOMETRIES", "40"))
"""Geometries that are drawn; the environment may ask for more."""


def reason_to_skip(interprets: bool) -> str | None:
    try:
        version("triton")
    except PackageNotFoundError:
        return "Triton is not installed"
    if tuple(map(int, version("triton").split(".")[:2])) < FIRST_TRITON:
        return f"the kernel needs triton 3.6 or newer, got {version('triton')}"
    numpy = tuple(map(int, version("numpy").split(".")[:2]))
    if interprets and numpy >= FIRST_NUMPY_WITHOUT_INTERPRETER:
        return f"Triton's interpreter needs numpy before 2.4, got {version('numpy')}"
    return None


@pytest.mark.parametrize("arguments", [("interpret", str(GEOMETRIES)), ("compile",)])
def test_kernels(arguments: tuple[str, ...], tmp_path: Path) -> None:
    interprets = arguments[0] == "interpret"
    if (reason := reason_to_skip(interprets)) is not None:
        pytest.skip(reason)
    paths = [str(HERE.parents[1]), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": str(int(interprets)), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(HERE / "fused_checks.py"), *arguments],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr[-4000:]}"
    print(run.stdout)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_kernel_is_never_chosen(device: str) -> None:
    """No GPU has measured it."""
    geometry = conv_geometry((20, 20), 3, 2, 1)
    problem = Problem(geometry, 8, 16, torch.float32, device)
    assert not ALGORITHMS["fused"].is_measured
    assert choose(problem) != "fused"
    assert "im2col" in applicable(problem)


def test_the_kernel_is_refused_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"`algorithm` must be one of .*'fused'"):
        conv_input_factor(torch.ones(2, 3, 6, 6), 3, algorithm="fused")
