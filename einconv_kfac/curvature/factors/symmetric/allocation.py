"""New memory for results, in large pages where the system supports them.

A result of a few thousand rows has tens of megabytes, which the system maps page by page on first
write. With pages of 4 kB this takes longer than the product itself. Linux maps pages of 2 MB in
memory for which a program requests them by ``madvise``.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of

PAGE = 1 << 21
"""Bytes of a large page."""


def new_matrices(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor on the device of ``like``."""
    fresh = like.new_empty(shape, dtype=dtype)
    if profile_of(fresh.device.type).is_host and fresh.nbytes >= 2 * PAGE and type(fresh) is Tensor:
        _request_large_pages(fresh)
    return fresh


def _request_large_pages(fresh: Tensor) -> None:
    """Request large pages for the memory of ``fresh``, where the system supports them."""
    advise = _madvise()
    if advise is None or torch.compiler.is_compiling():
        return
    try:
        pointer = fresh.data_ptr()
    except RuntimeError:  # a wrapper without memory of its own
        return
    start = -(-pointer // PAGE) * PAGE
    stop = (pointer + fresh.nbytes) // PAGE * PAGE
    if pointer and start < stop:
        advise(start, stop - start, mmap.MADV_HUGEPAGE)


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the system's ``madvise``, if that supports large pages."""
    function = getattr(ctypes.CDLL(None), "madvise", None) if _has_large_pages() else None
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _has_large_pages() -> bool:
    """Return whether Python was built on a system with large pages."""
    return hasattr(mmap, "MADV_HUGEPAGE")
