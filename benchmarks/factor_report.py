"""The table, the summary and the picture of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from factor_bounds import SORTS
from factor_contestants import NAMES, OURS
from factor_layers import Layer
from matplotlib.figure import Figure
from timing import mean

from einconv_kfac.curvature.factors.choice import choose

LIMITED = ("einconv", "im2col")
"""The contestants that the aims are about."""
AT_MOST = "".join(f"{f'max {name}':>12}" for name in LIMITED)


@dataclass
class Row:
    """What was measured of one layer."""

    layer: Layer
    approximation: str
    times: dict[str, float]
    memory: dict[str, float]
    algorithms: dict[str, float]
    least: float
    shares: dict[str, float]

    def ratio(self, name: str) -> float:
        """Time of a contestant as a multiple of ours."""
        return self.times[name] / self.times[OURS]

    def limit(self, name: str) -> float:
        """Time of a contestant as a multiple of what no exact method can avoid."""
        return self.times[name] / self.least

    @property
    def aims(self) -> dict[str, float]:
        """What the ratios are to be at least, on average over layers of this kind."""
        expand, large = self.approximation == "expand", self.layer.is_large
        if self.layer.kind == "dense":
            return {"einconv": 1.3, "im2col": 1.3} if expand else {"einconv": 2.0, "im2col": 1.5}
        if expand:
            return {"einconv": 6.0, "im2col": 8.0 if large else 4.0}
        return {"einconv": 5.0, "im2col": 10.0}

    @property
    def misses(self) -> dict[str, float]:
        """The aims that this layer is below."""
        ratios = {name: self.ratio(name) for name in self.aims if name in self.times}
        return {name: aim for name, aim in self.aims.items() if ratios.get(name, aim) < aim}

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
        yield f"  {'':32} layers" + "".join(f"{name:>12}" for name in NAMES[1:]) + AT_MOST
        for title, belongs in groups.items():
            chosen = [r for r in rows if r.approximation == approximation and belongs(r)]
            means = [mean([r.ratio(name) for r in chosen if name in r.times]) for name in NAMES[1:]]
            limits = [mean([r.limit(name) for r in chosen if name in r.times]) for name in LIMITED]
            values = "".join(f"{value:12.2f}" for value in [*means, *limits])
            yield f"  {title:32} {len(chosen):6}{values}"
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
        memory = "memory ours, im2col"
        yield f"{'network':14} {'layer':52}{head}{'least':>10}  {memory:>20}  algorithm"
        for row in (row for row in rows if row.approximation == approximation):
            times = "".join(
                f"{1e3 * row.times[name]:11.2f}" if name in row.times else f"{'-':>11}"
                for name in NAMES
            )
            memory = f"{row.memory[OURS]:10.2f}{row.memory['im2col']:10.2f}"
            name = choose(row.layer.problem) if row.algorithms else ""
            loss = f" ({row.choice_loss:.2f} x best)" if row.choice_loss > 1.1 else ""
            least = f"{1e3 * row.least:10.2f}"
            yield f"{row.layer.network:14} {row.layer!s:52}{times}{least}  {memory}  {name}{loss}"
        yield ""


def shortfalls(rows: Sequence[Row]) -> Iterator[str]:
    """Yield one line for each layer that is below an aim: how far, and where its time goes.

    "At most" is the ratio of a method that takes no longer than what cannot be avoided.
    """
    for approximation in dict.fromkeys(row.approximation for row in rows):
        yield f"{approximation}: layers below an aim for the average of their kind"
        heads = "".join(f"{name}: is, aim, at most".rjust(28) for name in LIMITED)
        sorts = "".join(f"{sort:>10}" for sort in SORTS)
        yield f"{'':45}{heads}  {'distance':>9}{sorts}"
        for row in (row for row in rows if row.approximation == approximation and row.misses):
            found = ""
            for name in LIMITED:
                aim = row.misses.get(name)
                words = f"{row.ratio(name):.1f} {aim:4.1f} {row.limit(name):6.1f}" if aim else "-"
                found += f"{words:>28}"
            parts = "".join(f"{part:10.0%}" for part in row.shares.values())
            yield f"{row.layer!s:45}{found}  {row.limit(OURS):9.1f}{parts}"
        yield ""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the distribution of the ratios of each class."""
    approximations = list(dict.fromkeys(row.approximation for row in rows))
    figure = Figure(figsize=(5 * len(approximations), 4))
    axes = figure.subplots(1, len(approximations), sharey=True, squeeze=False)[0]
    for panel, approximation in zip(axes, approximations):
        for kind, style in (("overlapping", "-"), ("dense", ":")):
            for color, name in enumerate(LIMITED):
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
