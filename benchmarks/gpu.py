"""What a GPU has to tell: rates, waits, factors, steps and training, in calls of ten minutes.

Each measurement is a line of records.jsonl, and what is there is not measured again: a call that is
cut, or whose budget is spent, is continued by the next one. Times are by the device's events, after
it was synchronised. With --device cpu all parts run that need no GPU. The table of what is known is
printed at the end, and written to benchmarks/results/gpu/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_factors import factors, rates
from gpu_lab import Lab
from gpu_steps import steps, train, waits
from tables import RESULTS, command_line, heading, publish

SECTIONS: dict[str, Callable[[Lab], None]] = {
    "rates": rates,
    "waits": waits,
    "steps": steps,
    "factors": factors,
    "train": train,
}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of all sections; of records with the same key, the last one counts."""
    latest = {(row["section"], row["device"], row["key"]): row for row in rows}
    lines = []
    for section in SECTIONS:
        own = [row for (name, *_), row in latest.items() if name == section]
        lines += [f"{section} ({len(own)})", *(f"  {line(row)}" for row in own), ""]
    return lines


def line(row: dict[str, Any]) -> str:
    """Return a record in one line."""
    hidden = {"section", "key", "took", "device"}
    numbers = (f"{name} {_short(value)}" for name, value in row.items() if name not in hidden)
    return f"[{row['device']}] {row['key']}: {'; '.join(numbers)}"


def _short(value: Any) -> str:
    """Return a value as text: numbers with four digits, curves by their end."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + ")"
    if isinstance(value, list) and value and isinstance(value[0], (list, tuple)):
        return f"... {value[-1]}"
    return str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the table."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, or cpu for what needs no GPU")
    add("--budget", type=float, default=540.0, help="seconds for this call")
    add("--only", default=",".join(SECTIONS), help="sections, in this order")
    add("--quick", action="store_true", help="a smoke test: tiny sizes")
    add("--output", type=Path, default=RESULTS / "gpu", help="folder of the results")
    options = parser.parse_args(arguments)
    if unknown := set(options.only.split(",")) - SECTIONS.keys():
        parser.error(f"--only must name sections of {list(SECTIONS)}, got {sorted(unknown)}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be a GPU of this machine, got none. Use --device cpu")
    stem = f"{device.type}-quick" if options.quick else device.type
    path = options.output / f"{stem}.jsonl"
    lab = Lab(device, path, options.budget, options.quick)
    for section in options.only.split(","):
        SECTIONS[section](lab)
    publish([heading(lab.name), "", *table(lab.rows)], path.with_suffix(".txt"))


if __name__ == "__main__":
    main()
