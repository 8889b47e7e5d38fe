"""What workers send each other in a step, beside the gradients.

Collectives of KFAC's steps are recorded on narrow versions of ResNet-50 and ViT-B/16, with all of
their layers, in processes with gloo: DistributedDataParallel and fully_shard, fixed and automatic
steps. Expected are, from the shapes of factors and parameters alone:

- one triangle of every factor in an all-reduce, where factors are updated; with
  `divide_factors`, in a reduction to the worker that inverts them;
- with `communication_dtype=torch.float16`, half of these bytes in an exchange of every worker with
  every other and, unless factors are divided, an all-gather of sums; diagonals in an all-reduce;
- one triangle of every inverse in broadcasts, where layers are inverted;
- with fully_shard, all-gathers of parameters, gradients and states, in every step;
- and messages of 1 kB.

The same formulas at full width give the table of bytes, and with the stated bandwidth and latency
that of times. A worker sends 2 (N - 1) / N S bytes in a ring all-reduce of S bytes, and half of
that in an all-gather or, on average, in a reduction to one worker or a broadcast.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tables import RESULTS, command_line, heading, publish
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from einconv_kfac import KFAC
from einconv_kfac.curvature.layers.discovery import find_layers
from einconv_kfac.distributed.message import LENGTH

BANDWIDTH, LATENCY = 25e9, 5e-6
"""Bytes per second of a worker's link, and seconds of a message: 200 Gb/s, as between servers."""
MESSAGE_BYTES, FLOAT, SHORT = 8 * LENGTH, 4, 2
BUCKET_BYTES = 25 << 20
"""Of a message of DistributedDataParallel."""
PERIODS = ((10, 100), (1, 10))
STEPS = 21
"""Steps up to one without factors: before, the period is a tenth of the steps, at least 1."""
IMPORTED = ["torch._dynamo", "torch.distributed.fsdp", "einconv_kfac.optim"]
"""What the process imports that forks all workers."""
MODES: dict[str, dict[str, Any]] = {"fixed": {"lr": 0.01, "adaptive": False}, "automatic": {}}


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.short: nn.Module = nn.Identity()
        if inputs != outputs:
            short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.short = nn.Sequential(short, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        return torch.relu(self.body(x) + self.short(x))


def resnet50(width: int, classes: int) -> nn.Module:
    """Return ResNet-50, of width 64, or a narrower one."""
    stem = (nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks, inputs = [], width
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            stride = 2 if stage and not index else 1
            blocks.append(Bottleneck(inputs, width << stage, stride))
            inputs = 4 * (width << stage)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head)


class Attention(nn.Module):
    """Self-attention with a layer for each of queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, of 12 heads."""
        parts = (own(x).unflatten(-1, (12, -1)).transpose(1, 2) for own in (self.q, self.k, self.v))
        found = nn.functional.scaled_dot_product_attention(*parts)
        result: Tensor = self.out(found.transpose(1, 2).flatten(-2))
        return result


class Block(nn.Module):
    """The block of a vision transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.body = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        x = x + self.attention(self.first(x))
        result: Tensor = x + self.body(self.second(x))
        return result


class ViT(nn.Module):
    """ViT-B/16, of width 768, or a narrower one."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        found = self.blocks(self.patches(x).flatten(2).mT)
        scores: Tensor = self.head(self.norm(found.mean(1)))
        return scores


@dataclass(frozen=True)
class Subject:
    """A network in two widths.

    Args:
        model: Makes it from its width and number of classes.
        widths: The full width, and that of the recorded one.
    """

    model: Callable[[int, int], nn.Module]
    widths: tuple[int, int]

    def made(self, *, full: bool) -> nn.Module:
        """Return the network; the full one without memory."""
        if not full:
            return self.model(self.widths[1], 10)
        with torch.device("meta"):
            return self.model(self.widths[0], 1000)


SUBJECTS = {"ResNet-50": Subject(resnet50, (64, 8)), "ViT-B/16": Subject(ViT, (768, 48))}


def triangle(size: int) -> int:
    """Return how many numbers the triangle of a symmetric matrix is sent as."""
    return (size + 1) // 2 * (size + 1)


@dataclass(frozen=True)
class Sizes:
    """What there is to send, in bytes.

    Args:
        parameters: Parameters, and as much of gradients.
        triangles: One triangle of every factor, and as much of inverses.
        diagonals: The diagonals of all factors.
        layers: The number of layers.
    """

    parameters: int
    triangles: int
    diagonals: int
    layers: int

    @property
    def short(self) -> int:
        """Triangles in float16."""
        return self.triangles * SHORT // FLOAT

    @staticmethod
    def of(model: nn.Module) -> Sizes:
        """Return the sizes of a model."""
        shapes = [layer.layout.shape for layer in find_layers(model)]
        numbers = sum(g * (triangle(rows) + triangle(columns)) for g, rows, columns in shapes)
        diagonals = sum(g * (rows + columns) for g, rows, columns in shapes)
        count = sum(parameter.numel() for parameter in model.parameters())
        return Sizes(FLOAT * count, FLOAT * numbers, FLOAT * diagonals, len(shapes))


@dataclass
class Traffic:
    """What one worker takes part in: bytes and messages of each kind."""

    sizes: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add_(self, kind: str, size: int) -> None:
        """Count a message."""
        self.sizes[kind] = self.sizes.get(kind, 0) + size
        self.counts[kind] = self.counts.get(kind, 0) + 1


@contextmanager
def recorded(traffic: Traffic) -> Iterator[None]:
    """Record the collectives inside the block."""

    def watch(name: str, kind: str, index: int) -> Any:
        original = getattr(distributed, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[index] if args else kwargs["output_tensor"]
            size = tensor.numel() * tensor.element_size()
            traffic.add_("message" if size == MESSAGE_BYTES else kind, size)
            return original(*args, **kwargs)

        return mock.patch.object(distributed, name, call)

    gathers = "all_gather_single"  # FSDP2's, from torch 2.13 on
    gathers = gathers if hasattr(distributed, gathers) else "all_gather_into_tensor"
    with (
        watch("all_reduce", "all-reduce", 0),
        watch("reduce", "reduce", 0),
        watch("broadcast", "broadcast", 0),
        watch(gathers, "all-gather", 0),
        watch("all_to_all_single", "exchange", 1),
    ):
        yield


@dataclass(frozen=True)
class Way:
    """A way to train.

    Args:
        mode: ``"fixed"`` or ``"automatic"``.
        sharded: Whether `fully_shard` divides the model.
        divides: Whether each layer's factors are on one worker.
        short: Whether factors are sent in float16.
    """

    mode: str
    sharded: bool = False
    divides: bool = False
    short: bool = False

    def names(self) -> tuple[str, str, str, str]:
        """Return the names of wrapper and step, of workers that have factors, and their bits."""
        wrapper = "fully_shard" if self.sharded else "DDP"
        return wrapper, self.mode, "one" if self.divides else "all", "16" if self.short else "32"

    def options(self) -> dict[str, Any]:
        """Return the options of the optimizer."""
        dtype = torch.float16 if self.short else None
        own = {"divide_factors": self.divides, "communication_dtype": dtype}
        return {**MODES[self.mode], "fallback": "gradient", **own}


def work(rank: int, size: int, folder: str, subject: str, runs: Sequence[tuple[int, Way]]) -> None:
    """Train some runs in one process, and save what each sent in its first and last step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=start, rank=rank, world_size=size)
    found = [trained(size, subject, steps, way) for steps, way in runs]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    distributed.destroy_process_group()


def trained(size: int, subject: str, steps: int, way: Way) -> tuple[Traffic, Traffic]:
    """Return what one worker takes part in, in the first of some steps and in the last."""
    torch.manual_seed(0)
    model, loss_fn = SUBJECTS[subject].made(full=False), nn.CrossEntropyLoss()
    if way.sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))  # in place
        wrapped: nn.Module = model
    else:
        wrapped = DistributedDataParallel(model)
    opt, found = KFAC(wrapped, loss_fn, **way.options()), []
    for _ in range(steps):
        opt.zero_grad()
        loss_fn(wrapped(torch.randn(2, 3, 32, 32)), torch.randint(10, (2,))).backward()
        found.append(traffic := Traffic())
        with recorded(traffic):
            opt.step()
    return found[0], found[-1]


def measured(
    subject: str, size: int, runs: Sequence[tuple[int, Way]]
) -> list[tuple[Traffic, Traffic]]:
    """Return what one worker takes part in, for each of some runs, in the same processes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, folder, subject, runs)
        get_context("forkserver").set_forkserver_preload(IMPORTED)
        start_processes(work, arguments, nprocs=size, start_method="forkserver")  # type: ignore[no-untyped-call]
        found: list[tuple[Traffic, Traffic]] = torch.load(f"{folder}/found.pt", weights_only=False)
    return found


def sent(kind: str, size: float, workers: int) -> float:
    """Return the bytes that a worker sends for a collective, rings throughout."""
    return (2 if kind in ("all-reduce", "message") else 1) * (workers - 1) / workers * size


def expected(sizes: Sizes, way: Way) -> dict[str, int]:
    """Return the bytes of each kind of collective of the first step; one inversion counts.

    Gathered states are the momentum, or the last update and the slow momentum; the first step
    has none.
    """
    gathered = 2 * sizes.parameters if way.sharded else 0
    later = gathered and gathered + STATES[way.mode] * sizes.parameters
    factors = {"reduce" if way.divides else "all-reduce": sizes.triangles}
    if way.short:
        factors = {"all-reduce": sizes.diagonals, "exchange": sizes.short}
        gathered = later = 0 if way.divides else sizes.short
    found = {"broadcast": sizes.triangles, "all-gather": gathered, "all-gather later": later}
    return {**factors, **found}


STATES = {"fixed": 1, "automatic": 2}
FACTORS = "all-reduce", "reduce", "exchange"
"""Kinds of collectives with factors."""


def seconds(kind: str, size: float, messages: float, workers: int) -> float:
    """Return the time of collectives; a ring has N - 1 or 2 (N - 1) messages in a row."""
    hops = (workers - 1) * (2 if kind == "all-reduce" else 1)
    if kind in ("broadcast", "message"):  # trees
        hops = math.ceil(math.log2(workers)) * (2 if kind == "message" else 1)
    return messages * hops * LATENCY + sent(kind, size, workers) / BANDWIDTH


def rows_recorded(
    subjects: Sequence[str], counts: Sequence[int], ways: Sequence[Way], steps: int
) -> Iterator[str]:
    """Yield the table of what was recorded, as bytes of whole collectives."""
    yield "Recorded and expected kB of collectives; inversions are inverses sent by those expected"
    yield HEAD.format(
        *("network", "workers", "wrapper", "step", "on", "bits", "factors", "expected", "%"),
        *("inverses", "expected", "inversions", "gathered", "expected", "%", "messages"),
    )
    for subject in subjects:
        sizes = Sizes.of(SUBJECTS[subject].made(full=False))
        for workers in counts:
            lengths = [
                steps if workers == min(counts) and not (way.divides or way.short) else 1
                for way in ways
            ]
            runs = [*zip(lengths, ways)]
            for (count, way), (first, last) in zip(runs, measured(subject, workers, runs)):
                ours = expected(sizes, way)
                own = {kind: first.sizes.get(kind, 0) for kind in ours}
                kinds = [kind for kind in FACTORS if kind in ours]
                gathered = ours["all-gather later" if count > 1 else "all-gather"]
                inversions = own["broadcast"] / ours["broadcast"]
                yield HEAD.format(
                    *(subject, workers, *way.names()),
                    *_compared(*(sum(each[kind] for kind in kinds) for each in (own, ours))),
                    *_compared(own["broadcast"], ours["broadcast"])[:2],
                    f"{inversions:.3f}",
                    *_compared(last.sizes.get("all-gather", 0), gathered),
                    last.counts.get("message", 0) if count > 1 else "",
                )


WAYS = (
    *(Way(mode) for mode in MODES),
    *(Way(mode, divides=True) for mode in MODES),
    *(Way(mode, sharded=True) for mode in MODES),
    *(Way("fixed", divides=divides, short=True) for divides in (False, True)),
)
QUICK = Way("fixed", divides=True), Way("fixed", sharded=True), Way("fixed", short=True)
HEAD = (
    "{:10} {:>7} {:11} {:9} {:3} {:4} {:>8} {:>8} {:>6} {:>8} {:>8} {:>10} {:>8} {:>8} {:>6} {:>8}"
)


def _compared(found: float, ours: float) -> tuple[str, str, str]:
    """Return two numbers of bytes, and the deviation of the first."""
    deviation = f"{100 * (found / ours - 1):+.2f}" if ours else ""
    return f"{found / 1000:.1f}", f"{ours / 1000:.1f}", deviation


def rows_of_bytes(workers: int = 8) -> Iterator[str]:
    """Yield the bytes of the full networks, as parts of the all-reduce of gradients."""
    yield f"Full width, {workers} workers: MB that a worker sends, and per cent of the gradients'"
    head = "{:10} {:>11} {:>13} {:>7}" + 8 * " {:>16}" + " {:>22}"
    ways = [(divides, short) for short in (False, True) for divides in (False, True)]
    titles = [
        f"{a}/{b}{' divided' if divides else ':'}{' 16 bits' if short else ' MB, %'}"
        for divides, short in ways
        for a, b in PERIODS
    ]
    yield head.format("network", "gradients", "one triangle", "layers", *titles, "gathers of FSDP2")
    for name, subject in SUBJECTS.items():
        sizes = Sizes.of(subject.made(full=True))
        gradients = sent("all-reduce", sizes.parameters, workers)
        inverses = sent("broadcast", sizes.triangles, workers)
        factors = [
            sum(sent(k, v, workers) for k, v in _of_factors(sizes, Way("fixed", False, *way)))
            for way in ways
        ]
        found = [own / a + inverses / b for own in factors for a, b in PERIODS]
        later = [expected(sizes, Way(mode, sharded=True))["all-gather later"] for mode in MODES]
        gathers = [sent("all-gather", own, workers) for own in later]
        yield head.format(
            name,
            f"{gradients / 1e6:.0f}",
            f"{sizes.triangles / 1e6:.0f}",
            sizes.layers,
            *(f"{own / 1e6:.0f}, {100 * own / gradients:.0f}" for own in found),
            " / ".join(f"{100 * own / gradients:.0f} %" for own in gathers),
        )


def _of_factors(sizes: Sizes, way: Way) -> Iterator[tuple[str, int]]:
    """Yield the kinds and bytes of collectives with factors, without `fully_shard`."""
    for kind, size in expected(sizes, way).items():
        if kind in (*FACTORS, "all-gather"):
            yield kind, size


def rows_of_times() -> Iterator[str]:
    """Yield modelled milliseconds of a step's communication for many workers."""
    yield (
        f"Modelled ms per step at {BANDWIDTH / 1e9:.0f} GB/s and {LATENCY * 1e6:.0f} us, nothing "
        "overlapped (fixed rates, DDP)"
    )
    head = "{:10} {:>8} {:>10} {:>10} {:>10} {:>16} {:>16} {:>10}"
    titles = [f"{a}/{b}{way}" for way in ("", ", divided") for a, b in PERIODS]
    yield head.format("network", "workers", "gradients", *titles, "messages")
    for name, subject in SUBJECTS.items():
        sizes = Sizes.of(subject.made(full=True))
        for workers in (8, 16, 32, 64, 128, 256, 512, 1024):
            buckets = math.ceil(sizes.parameters / BUCKET_BYTES)
            gradients = seconds("all-reduce", sizes.parameters, buckets, workers)
            parts = math.ceil(sizes.triangles / FLOAT / (1 << 22))
            factors = seconds("all-reduce", sizes.triangles, parts, workers)
            senders = min(workers, sizes.layers)
            to_one = seconds("reduce", sizes.triangles, max(parts, senders), workers)
            inverses = seconds("broadcast", sizes.triangles, senders, workers)
            small = seconds("message", 0, 2, workers)
            own = [each / a + inverses / b for each in (factors, to_one) for a, b in PERIODS]
            times = (gradients, *own, small)
            yield head.format(name, workers, *(f"{1e3 * own:.2f}" for own in times))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--workers", default="2,4", help="numbers of workers")
    parser.add_argument("--quick", action="store_true", help="one network, two workers")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the table")
    given = parser.parse_args(arguments)
    counts = [2] if given.quick else [int(own) for own in given.workers.split(",")]
    subjects = ["ResNet-50"] if given.quick else list(SUBJECTS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    widths = ", ".join(f"{n}: {s.widths[1]} of {s.widths[0]}" for n, s in SUBJECTS.items())
    lines = [
        heading(f"recorded at narrow widths ({widths})"),
        "",
        *rows_recorded(subjects, counts, *((QUICK, 1) if given.quick else (WAYS, STEPS))),
        "",
        *rows_of_bytes(),
        "",
        *rows_of_times(),
    ]
    lines = [line.rstrip() for line in lines]
    name = "communication-quick.txt" if given.quick else "communication.txt"
    publish(lines, given.output / name)


if __name__ == "__main__":
    main()
