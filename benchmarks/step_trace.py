"""How often execution changes file in one automatic step of a three-layer CNN.

After a warm-up, every step of two periods is traced, each on a new batch. A call counts if it
enters a function or resumes a generator of the package. It changes file if its nearest caller
within the package is in another file, or if it has none. A step is ordinary, or it updates factors,
inverts them, or adapts the damping to the ratio of true and predicted reduction. All numbers are
counts, medians over the steps of a kind; no time is measured.

    python benchmarks/step_trace.py
    python benchmarks/step_trace.py --package path/to/another/checkout
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch
from tables import RESULTS, command_line, publish
from torch import nn

WARM_UP_STEPS = 100
TRACED_STEPS = 20
"""Two periods of the factors, whose default is ten steps."""
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")
"""Functions of their own up to Python 3.11 only, so that they do not count."""


@dataclass
class Trace:
    """The calls of one step.

    Args:
        root: Folder of the package.
        calls: Number of calls by file.
        entries: Number of calls by file that come from another one.
        kind: What the step does, filled in afterwards.
    """

    root: Path
    calls: Counter[str] = field(default_factory=Counter)
    entries: Counter[str] = field(default_factory=Counter)
    kind: str = ""

    def run(self, call: Callable[[], Any]) -> None:
        """Make the call, and count."""
        previous = sys.getprofile()
        sys.setprofile(self._count)
        try:
            call()
        finally:
            sys.setprofile(previous)

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        """Count a call, if it is one of the package."""
        if event != "call" or frame.f_code.co_name in COMPREHENSIONS:
            return
        own = self._file(frame)
        if own is None:
            return
        caller = frame.f_back
        while caller is not None and self._file(caller) is None:
            caller = caller.f_back
        self.calls[own] += 1
        if caller is None or self._file(caller) != own:
            self.entries[own] += 1

    def _file(self, frame: FrameType) -> str | None:
        """Return the file of a frame relative to the package, or None if it is not of it."""
        path, start = frame.f_code.co_filename, f"{self.root}/"
        return path.removeprefix(start) if path.startswith(start) else None


class Training:
    """A small network in training, each step of which is traced.

    Args:
        package: The package, of this or of another checkout.
        whole: Whether forward and backward pass belong to the step.
    """

    def __init__(self, package: Any, whole: bool = False) -> None:
        torch.manual_seed(0)
        self._truth = nn.Linear(3 * 16 * 16, 10)
        self._model = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=4),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, 10),
        )
        self._loss_fn = nn.CrossEntropyLoss()
        self._root = Path(package.__file__).resolve().parent
        self._optimizer: Any = package.KFAC(self._model, self._loss_fn)
        self._whole = whole

    def step(self) -> Trace:
        """Take a step."""
        before, trace = self._marks(), Trace(self._root)
        if self._whole:
            trace.run(self._backpropagate)
        else:
            self._backpropagate()
        trace.run(self._optimizer.step)
        done = [name for name, mark in self._marks().items() if mark != before[name]]
        trace.kind = " + ".join(done) or "ordinary"
        return trace

    def _backpropagate(self) -> None:
        """Compute the gradients."""
        x = torch.rand(64, 3, 16, 16)
        y = self._truth(x.flatten(1)).argmax(1)
        self._optimizer.zero_grad()
        self._loss_fn(self._model(x), y).backward()

    def _marks(self) -> dict[str, str]:
        """Return statistics that change in a step that does more than an ordinary one."""
        layers = self._optimizer.layer_statistics().values()
        marks = {
            "factors": [layer.get("factor_seconds") for layer in layers],
            "inverses": [layer.get("inverse_seconds") for layer in layers],
            "damping": self._optimizer.statistics().get("ratio"),
        }
        return {name: str(mark) for name, mark in marks.items()}  # nan differs from itself


def imported(checkout: Path | None) -> Any:
    """Import the package, from a checkout if one is given.

    Raises:
        SystemExit: If the package comes from elsewhere.
    """
    if checkout is not None:
        sys.path.insert(0, str(checkout.resolve()))
    package = import_module("einconv_kfac")
    found = Path(str(package.__file__)).resolve()
    if checkout is not None and checkout.resolve() not in found.parents:
        raise SystemExit(f"`--package` must be a checkout of einconv_kfac, got {found.parent}.")
    return package


def table(traces: Sequence[Trace]) -> list[str]:
    """Return the lines of both tables: by kind of step, and by file and kind."""
    kinds: dict[str, list[Trace]] = {"ordinary": []}
    for trace in traces:
        kinds.setdefault(trace.kind, []).append(trace)
    kinds = {kind: found for kind, found in kinds.items() if found}
    width = max(map(len, kinds)) + 2
    titles = ("steps", "files", "changes of file", "at most", "calls", "at most")
    lines = [f"{'step':{width}}" + "".join(f"{title:>{len(title) + 2}}" for title in titles)]
    for kind, found in kinds.items():
        changes = [trace.entries.total() for trace in found]
        calls = [trace.calls.total() for trace in found]
        numbers = (
            len(found),
            median(len(trace.calls) for trace in found),
            *(count(values) for values in (changes, calls) for count in (median, max)),
        )
        cells = (f"{n:{len(title) + 2}.0f}" for n, title in zip(numbers, titles))
        lines.append(f"{kind:{width}}" + "".join(cells))
    return [*lines, "", *_by_file(kinds)]


def _by_file(kinds: dict[str, list[Trace]]) -> list[str]:
    """Return how often each file is entered from another one in a step of each kind."""
    names = {name for found in kinds.values() for trace in found for name in trace.calls}
    rows = {
        name: [median(trace.entries[name] for trace in found) for found in kinds.values()]
        for name in sorted(names)
    }
    width = max(map(len, rows)) + 2
    lines = [
        f"{'entered from another file':{width}}" + "".join(f"{k:>{len(k) + 2}}" for k in kinds)
    ]
    for name, counts in sorted(rows.items(), key=lambda row: -row[1][0]):
        cells = (f"{count:{len(kind) + 2}.0f}" for kind, count in zip(kinds, counts))
        lines.append(f"{name:{width}}" + "".join(cells))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them if a file is given."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--package", type=Path, help="root of the checkout to trace (default: what is installed)")
    add("--whole", action="store_true", help="trace forward and backward pass as well")
    add("--quick", action="store_true", help="a smoke test: fewer steps, nothing is written")
    add("--output", type=Path, default=RESULTS / "step_trace.txt", help="file of the tables")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    training = Training(imported(options.package), options.whole)
    for _ in range(20 if options.quick else WARM_UP_STEPS):
        training.step()
    lines = table([training.step() for _ in range(6 if options.quick else TRACED_STEPS)])
    publish(lines, None if options.quick else options.output)


if __name__ == "__main__":
    main()
