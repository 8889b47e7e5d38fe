"""What the benchmarks share: their command line, the heading of a table, and its file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from platform import machine

import torch

RESULTS = Path(__file__).resolve().parent / "results"
"""The folder of the results that belong to the repository."""


def command_line(description: str) -> argparse.ArgumentParser:
    """Return a parser whose help starts with a module's docstring as it is."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def heading(*details: str) -> str:
    """Return the machine, the number of threads and torch's version, with details."""
    threads = f"{torch.get_num_threads()} thread(s)"
    return ", ".join((machine(), threads, f"torch {torch.__version__}", *details))


def publish(lines: Sequence[str], path: Path | None) -> None:
    """Print the lines of a table, and write them to a file if one is given."""
    print("\n".join(lines))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
