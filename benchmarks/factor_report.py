"""The table, the summary and the picture of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from factor_contestants import NAMES, OURS
from factor_layers import Layer
from matplotlib.figure import Figure
from timing import mean

from einconv_kfac.curvature.factors.choice import choose


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
    approximations = list(dict.fromkeys(row.approximation for row in rows))
    figure = Figure(figsize=(5 * len(approximations), 4))
    axes = figure.subplots(1, len(approximations), sharey=True, squeeze=False)[0]
    for panel, approximation in zip(axes, approximations):
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
