"""The fused kernel in Triton's interpreter, and compiled for GPUs; run by `test_fused_kernel`.

TRITON_INTERPRET=1 python fused_checks.py interpret 300
python fused_checks.py compile
"""

from __future__ import annotations

import random
import re
import sys
from typing import Any

import torch
from factor_definition import columns, factor

from einconv_kfac.curvature import conv_input_factor
from einconv_kfac.curvature.factors import fused_kernels as kernels
from einconv_kfac.geometry import Axis, Geometry

SUMS = 1e-6
"""Relative error of short sums in float32."""

MOST_SITES = 600


def drawn(source: random.Random) -> tuple[Geometry, int, int]:
    """A geometry in one to three dimensions, its channels per group and its batch."""
    axes = []
    for _ in range(source.choice((1, 2, 2, 2, 3))):
        kernel, dilation = source.randint(1, 4), source.randint(1, 3)
        sides = source.randint(0, 3), source.randint(0, 3)
        least = max(1, (kernel - 1) * dilation + 1 - sum(sides))
        size = source.randint(least, least + 6)
        axes.append(Axis(size, kernel, source.randint(1, 3), sides, dilation))
    return Geometry(tuple(axes), source.choice((1, 1, 2, 3))), source.randint(1, 4), 2


def check(geometry: Geometry, channels: int, batch: int, source: random.Random) -> float:
    """The relative error of one factor, added to a multiple of another one."""
    torch.manual_seed(source.randint(0, 1 << 30))
    shape = (batch, channels * geometry.groups, *geometry.input_size)
    dtype = source.choice((torch.float32, torch.float16))
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    if source.random() < 0.3:  # channels last
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    bias, beta, alpha = source.random() < 0.5, source.choice((0.0, 0.9)), source.choice((1.0, 0.3))
    expected = factor(columns(x.double(), geometry), "expand", bias=bias)
    start = torch.randn(expected.shape)
    start = start + start.mT
    options: dict[str, Any] = {
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "groups": geometry.groups,
        "bias": bias,
        "algorithm": "fused",
        "beta": beta,
        "alpha": alpha,
    }
    found = conv_input_factor(x, geometry.kernel_size, **options, out=start.clone())
    again = conv_input_factor(x, geometry.kernel_size, **options, out=start.clone())
    assert torch.equal(found, again), "another result for the same input"
    assert torch.equal(found, found.mT), "not symmetric"
    expected = beta * start.double() + alpha * expected
    error = (found.double() - expected).norm()
    return float(error / expected.norm()) if expected.any() else float(error)


def interpret(count: int) -> None:
    """Compare drawn geometries with the definition."""
    source, worst, done = random.Random(0), 0.0, 0
    while done < count:
        geometry, channels, batch = drawn(source)
        if batch * geometry.positions > MOST_SITES:
            continue
        error = check(geometry, channels, batch, source)
        assert error < SUMS, (geometry, channels, error)
        worst, done = max(worst, error), done + 1
    large = Geometry((Axis(9, 3, 1, (1, 1)), Axis(8, 3, 1, (1, 1))))
    worst = max(worst, check(large, 15, 2, source))  # several tiles
    long = Geometry((Axis(1200, 3, 1, (1, 1)),))
    worst = max(worst, check(long, 2, 2, source))  # several parts
    print(f"{done + 2} geometries, worst relative error {worst:.1e}")


POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
SHAPES = {  # K, S, P, D of three axes
    "3x3": (1, 3, 3, 1, 1, 1, 0, 1, 1, 1, 1, 1),
    "stem": (1, 7, 7, 1, 2, 2, 0, 3, 3, 1, 1, 1),
    "3d": (3, 3, 3, 1, 2, 2, 1, 1, 1, 1, 2, 2),
}


def compile_for(target: Any) -> int:
    """Compile all kernels for a target, and return their number."""
    triton: Any = __import__("triton.compiler").compiler
    axis_names = [f"{letter}{axis}" for letter in "KSPD" for axis in range(3)]
    done = 0
    for shape in SHAPES.values():
        for dtype, precision in (
            ("fp32", "ieee"),
            ("fp32", "tf32"),
            ("bf16", "ieee"),
            ("fp16", "ieee"),
        ):
            for rows in (16, 64):
                constants = dict(zip(axis_names, shape)) | {
                    "ROWS": rows,
                    "SITES": 32,
                    "PRECISION": precision,
                }
                pointers = {"x": POINTERS[dtype], "sums": "*fp32"}
                code = compiled(triton, kernels.partial_products, pointers, {}, constants, target)
                assert "mma" in code or precision == "ieee", (dtype, precision)
                done += 1
    for has_beta in (False, True):
        pointers = {"sums": "*fp32", "out": "*fp32"}
        scalars = {"beta": "fp32", "alpha": "fp32"}
        constants = {"ROWS": 64, "HAS_BETA": has_beta}
        compiled(triton, kernels.add_parts, pointers, scalars, constants, target)
        done += 1
    return done


def compiled(
    triton: Any, kernel: Any, pointers: Any, scalars: Any, constants: Any, target: Any
) -> str:
    """The text of a compiled kernel, which must be free of atomic operations."""
    signature = dict.fromkeys(kernel.arg_names, "i32") | pointers | scalars
    signature |= dict.fromkeys(constants, "constexpr")
    source = triton.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=target)
    assert made.asm["cubin"]
    code: str = made.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", code)
    return code


def compile_all() -> None:
    """Compile for two generations of GPUs."""
    kind: Any = __import__("triton.backends.compiler").backends.compiler.GPUTarget
    for capability in (80, 90):
        print(f"sm_{capability}: {compile_for(kind('cuda', capability, 32))} kernels")


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        interpret(int(sys.argv[2]))
    else:
        compile_all()
