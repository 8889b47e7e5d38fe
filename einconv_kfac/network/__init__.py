"""Tensor networks as immutable values, built and simplified without tensors."""

from einconv_kfac.network.drawing import draw
from einconv_kfac.network.explanation import explain
from einconv_kfac.network.network import Network
from einconv_kfac.network.node import Node
from einconv_kfac.network.operand import Delta, Leaf, Pattern
from einconv_kfac.network.simplification import simplified

__all__ = ["Delta", "Leaf", "Network", "Node", "Pattern", "draw", "explain", "simplified"]
