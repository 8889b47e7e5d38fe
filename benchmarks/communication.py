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
from collections.abc import Iterator, Sequence
from pathlib import Path

from communication_networks import SUBJECTS
from communication_records import FLOAT, MODES, Sizes, Way, measured
from tables import RESULTS, command_line, heading, publish

BANDWIDTH, LATENCY = 25e9, 5e-6
"""Bytes per second of a worker's link, and seconds of a message: 200 Gb/s, as between servers."""
BUCKET_BYTES = 25 << 20
"""Of a message of DistributedDataParallel."""
PERIODS = ((10, 100), (1, 10))
STEPS = 21
"""Steps up to one without factors: before, the period is a tenth of the steps, at least 1."""


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
