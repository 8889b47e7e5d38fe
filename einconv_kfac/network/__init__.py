"""Tensor networks as immutable values, simplified without a tensor in sight."""

from einconv_kfac.network.network import Network, Node
from einconv_kfac.network.operand import Delta, Leaf, Pattern
from einconv_kfac.network.simplification import simplified

__all__ = ["Delta", "Leaf", "Network", "Node", "Pattern", "simplified"]
