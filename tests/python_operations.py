"""Operations that torch writes in Python, which take milliseconds for tensors of any size."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def python_operations_noted() -> Iterator[list[str]]:
    """Note the names of the operations in Python that torch calls to find shapes."""
    called: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.endswith("_prims_common/wrappers.py"):
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(None)
