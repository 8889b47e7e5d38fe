"""Tensor networks as immutable values, built and simplified without tensors."""

from einconv_kfac.network.cache import cached
from einconv_kfac.network.drawing import draw
from einconv_kfac.network.explanation import explain
from einconv_kfac.network.network import Network
from einconv_kfac.network.node import Node
from einconv_kfac.network.operand import Delta, Leaf, Pattern
from einconv_kfac.network.simplification import simplified
from einconv_kfac.network.step import Shape

__all__ = [
    "Delta",
    "Leaf",
    "Network",
    "Node",
    "Pattern",
    "Shape",
    "cached",
    "draw",
    "explain",
    "simplified",
]
