"""Constant matrices whose elements are kept as an array, so that a call copies nothing."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

ARRAY_TYPECODES = {torch.float32: "f", torch.float64: "d"}
"""The typecode of `array` for each dtype of a sum."""


def constant_matrix(elements: array[float], rows: int, dtype: torch.dtype) -> Tensor:
    """View the elements, which are given by rows, as a matrix ``[rows, columns]`` on the CPU."""
    return torch.frombuffer(elements, dtype=dtype).view(rows, -1)
