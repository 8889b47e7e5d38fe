"""Measurements on one device, written down one by one, so that a run continues where it was cut."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

PRECISIONS = ("float32", "tf32", "bfloat16")
"""How products are computed: in float32, with inputs rounded by the device, or to bfloat16."""

LOST = "CUDA error"
"""What the message of an error says after which the process cannot use the device any more."""


@contextmanager
def with_precision(name: str) -> Iterator[None]:
    """Switch TF32 on or off inside of the block, for products and convolutions alike."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


class Lab:
    """Measures until a budget is spent.

    Args:
        device: The device.
        path: The file of records, one JSON object a line; what it has is not measured again.
        budget: Seconds for all measurements of this process.
        quick: Whether sizes are those of a smoke test.
    """

    def __init__(self, device: torch.device, path: Path, budget: float, quick: bool) -> None:
        self.device, self.quick = device, quick
        self._path, self._end = path, time.perf_counter() + budget
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._complete_lines()
        self._path.write_text("".join(f"{line}\n" for line in lines))
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    @property
    def is_gpu(self) -> bool:
        """Whether the device has events, peaks of memory and waits of the host."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """The device's name."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else "cpu"

    def _complete_lines(self) -> list[str]:
        """Return the records of earlier runs, without a line that was cut."""
        lines = self._path.read_text().splitlines() if self._path.is_file() else []
        return [line for line in lines if line.endswith("}")]

    def has(self, section: str, key: str) -> bool:
        """Return whether a measurement is known, of this device, and did not fail."""
        own = {"section": section, "key": key, "device": self.name}
        return any(own.items() <= row.items() and "error" not in row for row in self.rows)

    def measure(
        self, section: str, key: str, seconds: float, call: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Measure and write a record, unless it is known or less than ``seconds`` are left.

        What fails is a record too. After an error of the device the process ends, since nothing
        that follows would work; the next run tries again.
        """
        if self.has(section, key) or time.perf_counter() + seconds > self._end:
            return
        row: dict[str, Any] = {"section": section, "key": key, "device": self.name}
        begin = time.perf_counter()
        try:
            row |= call()
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {str(error)[:300]}"
            row |= {"error": message, "at": f"{Path(frame.filename).name}:{frame.lineno}"}
        row["took"] = round(time.perf_counter() - begin, 1)
        self._write(row)
        if LOST in row.get("error", ""):
            raise SystemExit(f"The device is lost after {section} {key}. Run again to go on.")
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def _write(self, row: dict[str, Any]) -> None:
        """Append a record to the file, and print it."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "device"})[:300], flush=True)

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, call: Callable[[], Any], budget: float = 0.3, least: int = 3) -> float:
        """Return the median time of a call by the device's events, after two calls to warm up.

        A quick run calls as often as it must.
        Without events it is that of the host's clock, which for a processor is the same.
        """
        call()
        call()
        self.synchronize()
        times: list[float] = []
        end = time.perf_counter() + (0 if self.quick else budget)
        while len(times) < least or (time.perf_counter() < end and len(times) < 100):
            times.append(self._once(call))
        return round(median(times), 4)

    def _once(self, call: Callable[[], Any]) -> float:
        """Return the milliseconds of one call."""
        if not self.is_gpu:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def peak_megabytes(self, call: Callable[[], Any]) -> float | None:
        """Return the peak of memory during a call beyond what there was before it."""
        if not self.is_gpu:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return round((torch.cuda.max_memory_allocated(self.device) - before) / 1e6, 1)
