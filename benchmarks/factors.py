"""Time and memory of the input-based Kronecker factors of the layers of real networks.

Every distinct layer of conv_layers.json, at batch size 32 for the networks on images of up to
64 pixels and 8 for those on 224, and some layers in one and three dimensions and a transposed
one. The contestants take turns; times are medians. On one thread a time is that of the
process, which other processes on the machine disturb least. Memory is the peak of the resident
set beyond what there was before the call, less the result. Writes a table and a picture to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import exp, log, prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.factors import conv_input_factor, conv_transpose_input_factor
from einconv_kfac.curvature.factors.choice import applicable, choose
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.geometry import Geometry, convolution, transposed_convolution

HERE = Path(__file__).resolve().parent
OURS = "ours"
NAMES = (OURS, "einconv", "curvlinops", "backpack", "im2col")


@dataclass(frozen=True)
class Layer:
    """A convolution, the shape of its input, and where it comes from."""

    network: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(hash=False)
    transposed: bool = False

    @property
    def geometry(self) -> Geometry:
        """The convolution, or the one that the transposed one is the adjoint of."""
        make = transposed_convolution if self.transposed else convolution
        return make(self.shape[2:], **self.options)

    @property
    def groups(self) -> int:
        """Number of channel groups."""
        return int(self.options.get("groups", 1))

    @property
    def problem(self) -> Problem:
        """What the choice of the algorithm depends on."""
        channels = self.shape[1] // self.groups
        return Problem(self.geometry, self.shape[0], channels, torch.float32, "cpu")

    @property
    def kind(self) -> str:
        """Whether its windows overlap."""
        overlapping = any(a.kernel_size > a.stride for a in self.geometry.axes)
        return "overlapping" if overlapping or self.transposed else "dense"

    @property
    def is_large(self) -> bool:
        """Whether it has stride 1 and images of 14 pixels and more."""
        axes = self.geometry.axes
        return self.kind == "overlapping" and all(
            a.stride == 1 and a.input_size >= 14 for a in axes
        )

    @property
    def result_size(self) -> int:
        """Number of elements of the factors."""
        return self.groups * self.problem.size**2

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        words = [f"{key[0]}{_short(value)}" for key, value in self.options.items()]
        return f"{sizes} {' '.join(words)}{' transposed' if self.transposed else ''}"


def _short(value: Any) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


EXTRA = (
    Layer("1d", (32, 64, 1024), {"kernel_size": (9,), "padding": (4,)}),
    Layer("1d", (8, 128, 2048), {"kernel_size": (3,), "padding": (8,), "dilation": (8,)}),
    Layer("3d", (8, 32, 16, 28, 28), {"kernel_size": (3, 3, 3), "padding": (1, 1, 1)}),
    Layer("3d", (8, 3, 16, 56, 56), {"kernel_size": (3, 7, 7), "stride": (1, 2, 2),
                                     "padding": (1, 3, 3)}),
    Layer("transposed", (32, 128, 14, 14), {"kernel_size": (4, 4), "stride": (2, 2),
                                            "padding": (1, 1)}, transposed=True),
)  # fmt: skip


def layers() -> Iterator[Layer]:
    """Yield every distinct layer."""
    seen = set()
    for network, found in json.loads((HERE / "conv_layers.json").read_text()).items():
        batch = 8 if max(layer["in_shape"][-1] for layer in found) > 64 else 32
        batch = 8 if network == "alexnet" else batch
        for layer in found:
            names = ("kernel_size", "stride", "padding", "dilation", "groups")
            values = [tuple(v) if isinstance(v := layer[n], list) else v for n in names]
            shape = (batch, *layer["in_shape"])
            if (shape, *values) not in seen:
                seen.add((shape, *values))
                yield Layer(network, shape, dict(zip(names, values)))
    yield from EXTRA


def ours(layer: Layer, approximation: str, algorithm: str | None = None) -> Callable[[Tensor], Any]:
    """Return the call of this package."""
    function = conv_transpose_input_factor if layer.transposed else conv_input_factor
    choice = {"approximation": approximation, "algorithm": algorithm}
    options: dict[str, Any] = {**layer.options, **choice}
    return lambda x: function(x, **options)


def unfolded(x: Tensor, layer: Layer) -> Tensor:
    """Return ``[n, (c k), s]``, by torch where it has an unfold."""
    geometry, axes = layer.geometry, layer.geometry.axes
    if layer.transposed:  # a convolution of the input with zeros between
        sizes = [(size - 1) * axis.stride + 1 for size, axis in zip(x.shape[2:], axes)]
        spaced: tuple[Any, ...] = (..., *(slice(None, None, axis.stride) for axis in axes))
        wide = x.new_zeros(*x.shape[:2], *sizes)
        wide[spaced] = x
        sides = [axis.span - 1 - side for axis in reversed(axes) for side in axis.padding]
        wide = functional.pad(wide, sides)
        a = functional.unfold(wide, geometry.kernel_size, geometry.dilation)
        entries = torch.unflatten(a, 1, (x.shape[1], *geometry.kernel_size))
        return entries.flip(2, 3).reshape(a.shape)
    x = functional.pad(x, [side for axis in reversed(axes) for side in axis.padding])
    if geometry.ndim == 2:
        return functional.unfold(x, geometry.kernel_size, geometry.dilation, 0, geometry.stride)
    for dim, axis in enumerate(axes, start=2):
        x = x.unfold(dim, axis.span, axis.stride)
    d = geometry.ndim
    dilated: tuple[Any, ...] = (..., *(slice(None, None, axis.dilation) for axis in axes))
    x = x[dilated].permute(0, 1, *range(2 + d, 2 + 2 * d), *range(2, 2 + d))
    return x.reshape(x.shape[0], -1, geometry.positions)


def im2col(layer: Layer, approximation: str) -> Callable[[Tensor], Any]:
    """Return unfold and one matrix product."""

    def call(x: Tensor) -> Tensor:
        a = unfolded(x, layer)
        a = a.mean(2, keepdim=True) if approximation == "reduce" else a
        a = torch.unflatten(a, 1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)
        result: Tensor = a @ a.mT / x.shape[0]
        return result

    return call


def einconv(layer: Layer, approximation: str) -> Callable[[Tensor], Any] | None:
    """Return einconv 0.1.0's expression, built and evaluated."""
    if layer.transposed or find_spec("einconv") is None:
        return None
    name = "convNd_kfc" if approximation == "expand" else "convNd_kfac_reduce"
    module: Any = import_module(f"einconv.expressions.{name}")

    def call(x: Tensor) -> Tensor:
        equation, operands, shape = module.einsum_expression(x, **layer.options)
        return torch.einsum(equation, *operands).reshape(shape)

    return call


def curvlinops(layer: Layer, approximation: str) -> Callable[[Tensor], Any] | None:
    """Return the way of curvlinops, which has no factors per group."""
    unknown = layer.transposed or layer.groups > 1 or layer.geometry.ndim != 2
    if unknown or find_spec("curvlinops") is None:
        return None
    ways: Any = import_module("curvlinops.kfac_utils")
    extract = ways.extract_patches if approximation == "expand" else ways.extract_averaged_patches
    names = ("kernel_size", "stride", "padding", "dilation", "groups")
    arguments = [layer.options[name] for name in names]

    def call(x: Tensor) -> Tensor:
        a = extract(x, *arguments).reshape(-1, layer.problem.size)
        return torch.einsum("bi,bj->ij", a, a).div_(x.shape[0])

    return call


def backpack(layer: Layer, approximation: str) -> Callable[[Tensor], Any] | None:
    """Return the way of BackPACK, which has expand only and no groups."""
    if approximation == "reduce" or layer.groups > 1:
        return None

    def call(x: Tensor) -> Tensor:
        a = unfolded(x, layer)
        return torch.einsum("bik,bjk->ij", a, a) / x.shape[0]

    return call


CONTESTANTS = {"einconv": einconv, "curvlinops": curvlinops, "backpack": backpack,
               "im2col": im2col}  # fmt: skip


@dataclass
class Row:
    """What was measured of one layer."""

    layer: Layer
    approximation: str
    times: dict[str, float]
    memory: dict[str, float]
    algorithms: dict[str, float]

    def ratio(self, name: str) -> float:
        """Time of a contestant as a multiple of ours."""
        return self.times[name] / self.times[OURS]

    @property
    def choice_loss(self) -> float:
        """Time of the chosen algorithm as a multiple of the best one's."""
        return self.times[OURS] / min(self.algorithms.values(), default=self.times[OURS])


def seconds(
    calls: Mapping[str, Callable[[], Any]], budget: float, threads: int
) -> dict[str, float]:
    """Return the median time of each call; they take turns until the budget is spent."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    begin = time.perf_counter()
    while len(times[OURS]) < 3 or (time.perf_counter() < begin + budget and len(times[OURS]) < 101):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: median(found) for name, found in times.items()}


def _status(name: str) -> float:
    """Return an entry of the process' status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak(call: Callable[[], Tensor]) -> float:
    """Return the peak of the resident set during the call, in bytes beyond what there was."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def measure(layer: Layer, approximation: str, budget: float, threads: int) -> Row:
    """Time the contestants and our algorithms on one layer."""
    x = torch.randn(layer.shape, generator=torch.Generator().manual_seed(0))
    functions = {name: make(layer, approximation) for name, make in CONTESTANTS.items()}
    functions = {OURS: ours(layer, approximation), **functions}
    calls = {name: partial(f, x) for name, f in functions.items() if f is not None}
    reference = calls[OURS]()
    for call in calls.values():
        torch.testing.assert_close(call().reshape_as(reference), reference, rtol=1e-3, atol=1e-3)
    del reference
    result = 4.0 * layer.result_size
    memory = {name: max(0.0, peak(call) - result) / (4 * x.numel()) for name, call in calls.items()}
    times = seconds(calls, budget, threads)
    algorithms: dict[str, float] = {}
    if approximation == "expand" and not layer.transposed:
        names = [name for name in applicable(layer.problem) if name != choose(layer.problem)]
        others = {name: partial(ours(layer, approximation, name), x) for name in names}
        algorithms = seconds({OURS: calls[OURS], **others}, budget / 2, threads)
        algorithms = {name: t * times[OURS] / algorithms[OURS] for name, t in algorithms.items()}
    return Row(layer, approximation, times, memory, algorithms)


def mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return exp(sum(map(log, values)) / len(values)) if values else float("nan")


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the geometric means of each class, and the slowest layers."""
    groups: dict[str, Callable[[Row], bool]] = {
        "overlapping": lambda row: row.layer.kind == "overlapping",
        "  stride 1, 14 pixels and more": lambda row: row.layer.is_large,
        "  one group": lambda row: row.layer.kind == "overlapping" and row.layer.groups == 1,
        "  several groups": lambda row: row.layer.kind == "overlapping" and row.layer.groups > 1,
        "dense": lambda row: row.layer.kind == "dense",
    }
    for approximation in dict.fromkeys(row.approximation for row in rows):
        yield f"{approximation}: times as multiples of ours, geometric means"
        yield f"  {'':32} layers" + "".join(f"{name:>12}" for name in NAMES[1:])
        for title, belongs in groups.items():
            chosen = [r for r in rows if r.approximation == approximation and belongs(r)]
            means = [mean([r.ratio(name) for r in chosen if name in r.times]) for name in NAMES[1:]]
            yield f"  {title:32} {len(chosen):6}" + "".join(f"{value:12.2f}" for value in means)
        chosen = [r for r in rows if r.approximation == approximation]
        lost = [r for r in chosen if min(map(r.ratio, r.times)) < 1 / 1.1]
        yield f"  more than 10 % slower than the best of the others: {len(lost)} of {len(chosen)}"
        most = max(row.memory[OURS] for row in chosen)
        middle = [median(row.memory[name] for row in chosen) for name in (OURS, "im2col")]
        yield (
            f"  memory in copies of the input: ours at most {most:.2f}, median {middle[0]:.2f}; "
            f"im2col median {middle[1]:.2f}"
        )
    picked = [row for row in rows if row.algorithms]
    good = sum(row.choice_loss <= 1.1 for row in picked)
    yield f"chosen algorithm within 10 % of the best: {good} of {len(picked)} layers"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield one line per layer."""
    for approximation in dict.fromkeys(row.approximation for row in rows):
        yield f"{approximation}: milliseconds, and memory in copies of the input"
        head = "".join(f"{name:>11}" for name in NAMES)
        yield f"{'network':14} {'layer':52}{head}  {'memory ours, im2col':>20}  algorithm"
        for row in (row for row in rows if row.approximation == approximation):
            times = "".join(
                f"{1e3 * row.times[name]:11.2f}" if name in row.times else f"{'-':>11}"
                for name in NAMES
            )
            memory = f"{row.memory[OURS]:10.2f}{row.memory['im2col']:10.2f}"
            name = choose(row.layer.problem) if row.algorithms else ""
            loss = f" ({row.choice_loss:.2f} x best)" if row.choice_loss > 1.1 else ""
            yield f"{row.layer.network:14} {row.layer!s:52}{times}  {memory}  {name}{loss}"
        yield ""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the distribution of the ratios of each class."""
    names = ("einconv", "im2col")
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2, sharey=True)
    for panel, approximation in zip(axes, ("expand", "reduce")):
        for kind, style in (("overlapping", "-"), ("dense", ":")):
            for color, name in enumerate(names):
                ratios = sorted(
                    row.ratio(name)
                    for row in rows
                    if row.approximation == approximation and row.layer.kind == kind
                    and name in row.times
                )  # fmt: skip
                share = [(i + 0.5) / len(ratios) for i in range(len(ratios))]
                panel.plot(share, ratios, style, color=f"C{color}", label=f"{name}, {kind}")
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set(yscale="log", title=approximation, xlabel="share of layers")
    axes[0].set_ylabel("time as a multiple of ours")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def machine(threads: int) -> str:
    """Return what the times were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    capability = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{model} ({capability}), {threads} thread(s), {versions}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small layers, for a test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for a layer")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "factors.txt")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chosen = list(layers())
    if options.quick:
        chosen = sorted(chosen, key=lambda layer: prod(layer.shape) * layer.result_size)[:4]
    rows = []
    for approximation in ("expand", "reduce"):
        for layer in chosen:
            rows.append(measure(layer, approximation, options.budget, options.threads))
            print(*list(table(rows[-1:]))[2:3], flush=True)
    text = [machine(options.threads), "", *summary(rows), "", *table(rows)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(text) + "\n")
    draw(rows, options.output.with_suffix(".png"))
    print("\n".join(text[: text.index("", 2)]))


if __name__ == "__main__":
    main()
