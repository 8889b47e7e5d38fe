"""Time of convolutions by torch, by einconv 0.1.0 and by this package, on real layers.

The forward pass, input VJP and weight VJP of every distinct layer of conv_layers.json are timed.
Contestants take turns. Times are medians over calls: processor time on one thread (which other
programs on the machine disturb least), wall time on more. Times of einconv and of this package
include building the expression. Compare ratios, not absolute times.

    python benchmarks/operations.py --output benchmarks/results/operations.txt
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timing import mean, seconds
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from einconv_kfac.evaluate import contract_convolution, evaluate
from einconv_kfac.expressions import cache_clear, convNd_forward, convNd_kfac_reduce
from einconv_kfac.functionals import convNd
from einconv_kfac.geometry import Geometry, conv_geometry

HERE = Path(__file__).parent
OPERATIONS = ("forward", "input VJP", "weight VJP")
NAMES = ("torch", "ours", "einconv")
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Layer:
    """A convolution of a network."""

    network: str
    in_shape: tuple[int, ...]
    out_channels: int
    geometry: Geometry

    def __str__(self) -> str:
        axis, shape = self.geometry.axes[0], "x".join(map(str, self.in_shape))
        kernel = "x".join(map(str, self.geometry.kernel_size))
        return f"{shape}->{self.out_channels} {kernel}/{axis.stride} g{self.geometry.groups}"


def layers() -> Iterator[Layer]:
    """Yield every distinct layer."""
    seen = set()
    for network, found in json.loads((HERE / "conv_layers.json").read_text()).items():
        for entry in found:
            channels, *size = entry["in_shape"]
            names = ("kernel_size", "stride", "padding", "dilation", "groups")
            geometry = conv_geometry(size, *(entry[name] for name in names))
            layer = Layer(network, (channels, *size), entry["out_channels"], geometry)
            if (key := (layer.in_shape, layer.out_channels, geometry)) not in seen:
                seen.add(key)
                yield layer


def tensors(layer: Layer, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an input, a kernel, and a vector like the output."""
    torch.manual_seed(0)
    geometry = layer.geometry
    kernel = (layer.out_channels, layer.in_shape[0] // geometry.groups, *geometry.kernel_size)
    output = (batch, layer.out_channels, *geometry.output_size)
    return torch.randn(batch, *layer.in_shape), torch.randn(kernel), torch.randn(output)


def torchs(layer: Layer, x: Tensor, weight: Tensor, v: Tensor) -> list[Callable[[], Any]]:
    """Return torch's operations."""
    geometry = layer.geometry
    padding = [left for left, _ in geometry.padding]
    options = (list(geometry.stride), padding, list(geometry.dilation))

    def backward(*mask: bool) -> Callable[[], Any]:
        rest = (False, [0] * geometry.ndim, geometry.groups, [*mask, False])
        return lambda: torch.ops.aten.convolution_backward(v, x, weight, None, *options, *rest)

    def forward() -> Tensor:
        return functional.conv2d(x, weight, None, *options, geometry.groups)

    return [forward, backward(True, False), backward(False, True)]


def einconvs(layer: Layer, x: Tensor, weight: Tensor, v: Tensor) -> list[Callable[[], Any]]:
    """Return einconv's expressions, built and evaluated."""
    geometry = layer.geometry
    options = {
        "stride": geometry.stride,
        "padding": tuple(left for left, _ in geometry.padding),
        "dilation": geometry.dilation,
        "groups": geometry.groups,
    }

    def call(name: str, *arguments: Any) -> Callable[[], Any]:
        module: Any = import_module(f"einconv.expressions.convNd_{name}")

        def evaluated() -> Tensor:
            equation, operands, shape = module.einsum_expression(*arguments, **options)
            return torch.einsum(equation, *operands).reshape(shape)

        return evaluated

    return [
        call("forward", x, weight),
        call("input_vjp", weight, v, geometry.input_size),
        call("weight_vjp", x, v, geometry.kernel_size),
    ]


def ours(layer: Layer, x: Tensor, weight: Tensor, v: Tensor) -> list[Callable[[], Any]]:
    """Return this package's operations."""
    geometry = layer.geometry
    options = (None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    return [
        lambda: convNd(x, weight, *options),
        lambda: contract_convolution(geometry, "x", weight, v),
        lambda: contract_convolution(geometry, "w", x, v),
    ]


def contestants(layer: Layer, batch: int, with_einconv: bool = True) -> list[Calls]:
    """Return the calls to compare, per operation."""
    operands = tensors(layer, batch)
    rows = {"torch": torchs(layer, *operands), "ours": ours(layer, *operands)}
    if with_einconv and find_spec("einconv") is not None:
        rows["einconv"] = einconvs(layer, *operands)
    return [{name: calls[at] for name, calls in rows.items()} for at in range(len(OPERATIONS))]


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the largest number of bytes that are allocated at once during a call."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    recorded: Any = profiler.profiler
    events = recorded.kineto_results.events()
    now = most = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del result
    return most


def layer_table(chosen: list[Layer], batch: int, budget: float) -> Iterator[str]:
    """Yield the times of every layer and their summary."""
    head = f"{'network':17}{'layer':30}"
    yield head + "".join(f"{name:>12}: torch   ours einconv  (ms)" for name in OPERATIONS)
    ratios: dict[tuple[str, str], list[float]] = {}
    for layer in chosen:
        row = f"{layer.network:17}{layer!s:30}"
        for operation, calls in zip(OPERATIONS, contestants(layer, batch)):
            times = seconds(calls, budget)
            row += "    " + "".join(
                f"{1e3 * times.get(n, 0):9.2f}" for n in ("torch", "ours", "einconv")
            )
            row += f" {times['ours'] / times['torch']:5.2f}"
            for name in times.keys() - {"torch"}:
                ratios.setdefault((operation, name), []).append(times[name] / times["torch"])
        yield row
    yield ""
    for (operation, name), found in sorted(ratios.items()):
        slower = sum(
            1 for r, e in zip(found, ratios.get((operation, "einconv"), [])) if r > 1.1 * e
        )
        behind = f", slower than einconv on {slower} of {len(found)}" if name == "ours" else ""
        yield (
            f"{operation:12}{name:8} geometric mean {mean(found):.2f} times torch, "
            f"worst {max(found):.1f}{behind}"
        )


def high_dimensions(budget: float) -> Iterator[str]:
    """Yield times of convolutions in four and five dimensions."""
    for ndim, size, channels in ((4, 8, 8), (4, 12, 16), (5, 5, 8), (5, 7, 8)):
        x, weight = torch.randn(4, channels, *[size] * ndim), torch.randn(16, channels, *[3] * ndim)
        theirs: Any = import_module("einconv.functionals")
        calls: Calls = {
            "ours": lambda x=x, w=weight: convNd(x, w, padding=1),  # type: ignore[misc]
            "einconv": lambda x=x, w=weight, f=theirs.convNd: f(x, w, padding=1),  # type: ignore[misc]
        }
        times = seconds(calls, budget)
        speedup = times["einconv"] / times["ours"]
        yield (
            f"{ndim}d forward, {channels}x{size}^{ndim}: {1e3 * times['ours']:.1f} ms, einconv "
            f"{speedup:.1f} times that"
        )


def building() -> Iterator[str]:
    """Yield the time to build a forward expression, with filled and with empty caches."""
    x, weight = torch.randn(8, 64, 56, 56), torch.randn(64, 64, 3, 3)
    module = convNd_forward

    def call() -> None:
        module.einsum_expression(x, weight, padding=1)

    def anew() -> None:
        cache_clear()
        call()

    def often() -> None:
        for _ in range(1000):
            call()

    again = seconds({"again": often}, 0)["again"] / 1000
    yield (
        f"building a 2d forward expression: {1e6 * again:.1f} us, "
        f"{1e6 * seconds({'anew': anew}, 1)['anew']:.0f} us after clearing the caches"
    )


def memory() -> Iterator[str]:
    """Yield the peak of additional memory on a layer of ResNet-18."""
    x, weight = torch.randn(8, 64, 56, 56), torch.randn(64, 64, 3, 3)
    network = convNd_kfac_reduce.network(conv_geometry((56, 56), 3, padding=1), 8, 64)
    output, megabyte = 4 * 8 * 64 * 56**2, 2**20
    im2col = peak_bytes(lambda: weight.flatten(1) @ functional.unfold(x, 3, padding=1))
    forward = peak_bytes(lambda: convNd(x, weight, padding=1))
    reduced = peak_bytes(lambda: evaluate(network, x))
    inputs, result = 4 * x.numel(), 4 * (64 * 9) ** 2
    yield (
        f"memory beyond the output, 64x56x56 3x3, N=8: forward {(forward - output) / megabyte:.1f} "
        f"MiB, im2col {(im2col - output) / megabyte:.1f} MiB"
    )
    yield (
        f"KFAC-reduce: {(reduced - result) / inputs:.1%} of the input beyond the result "
        f"({result / megabyte:.1f} MiB)"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per comparison")
    parser.add_argument("--output", type=Path, help="file for the table")
    parser.add_argument("--quick", action="store_true", help="two small layers, for a test")
    arguments = parser.parse_args(words)
    chosen, batch = list(layers()), arguments.batch
    if arguments.quick:
        chosen, batch = [layer for layer in chosen if layer.in_shape[1] < 7], 1
    lines = [
        f"{platform.processor() or platform.machine()}, {arguments.threads} thread(s), torch "
        f"{torch.__version__}, float32, batch size {batch}"
    ]
    print(lines[0])
    budget = 0 if arguments.quick else arguments.budget
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    parts = [layer_table(chosen, batch, budget), building(), memory()]
    if find_spec("einconv") is not None and not arguments.quick:
        parts.append(high_dimensions(budget))
    for line in (line for part in parts for line in part):
        print(line, flush=True)
        lines.append(line)
    torch.set_num_threads(threads)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
