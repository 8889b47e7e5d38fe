"""Contraction of any network: index patterns as views and folds, then pairs of operands."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.expressions.constants import check_factor, constant
from einconv_kfac.expressions.shapes import check_tensor
from einconv_kfac.expressions.views import stepped
from einconv_kfac.network import Leaf, Network
from einconv_kfac.network.lowering import lowered
from einconv_kfac.network.network import check_network
from einconv_kfac.network.path import contraction_path


def evaluate(network: Network, *tensors: Tensor) -> Tensor:
    """Return the value of a network for the caller's tensors.

    Args:
        network: A network, simplified or not.
        tensors: One per slot of the network's leaves, of the leaf's ``source`` shape.

    Returns:
        Tensor of shape ``network.shape``.

    Raises:
        ValueError: If there are not as many tensors, or one is of another shape, or of another
            type or on another device than the first one.
        TypeError: If the network is none, or a tensor is none.

    >>> from einconv_kfac.expressions import convNd_forward
    >>> from einconv_kfac.geometry import conv_geometry
    >>> network = convNd_forward.network(conv_geometry((8,), 3), 2, 4, 5)
    >>> evaluate(network, torch.rand(2, 4, 8), torch.rand(5, 4, 3)).shape
    torch.Size([2, 5, 6])
    """
    _check(network, tensors)
    network = lowered(network)
    operands = _operands(network, tensors)
    known: dict[int, Tensor] = {}
    for positions, equation, value in contraction_path(network):
        taken = [operands.pop(position) for position in positions]
        if not operands and network.scale != 1:  # the last contraction: scale the smallest operand
            smallest = min(range(len(taken)), key=lambda at: taken[at].numel())
            taken[smallest] = taken[smallest] * float(network.scale)
            known.pop(value, None)
        if value not in known:
            known[value] = torch.einsum(equation, *taken)
        operands.append(known[value])
    (result,) = operands
    return stepped(result, network.finishing()).reshape(network.shape)


def _check(network: Network, tensors: tuple[Tensor, ...]) -> None:
    """Check the tensors of a network; views of others would be cropped."""
    check_network(network)
    leaves = {n.operand.slot: n.operand for n in network.nodes if isinstance(n.operand, Leaf)}
    if len(tensors) != max(leaves, default=-1) + 1:
        names = [leaves[slot].name for slot in sorted(leaves)]
        raise ValueError(f"`tensors` must be {names} of the network, got {len(tensors)} of them.")
    for slot, leaf in leaves.items():
        own, first = tensors[slot], tensors[0]
        check_tensor(own, leaf.name)
        pairs = list(zip(own.shape, leaf.source))
        is_other = any(type(a) is type(b) is int and a != b for a, b in pairs)
        if is_other or own.ndim != len(leaf.source):
            raise ValueError(
                f"`{leaf.name}` must have the shape {list(leaf.source)} of the network, got "
                f"{list(own.shape)}."
            )
        if (own.dtype, own.device) != (first.dtype, first.device):
            raise ValueError(
                f"`{leaf.name}` must be {first.dtype} on {first.device}, as the first tensor, got "
                f"{own.dtype} on {own.device}."
            )
    if tensors:
        check_factor(network.scale, tensors[0])


def _operands(network: Network, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the operands of the contraction."""
    device, dtype = tensors[0].device, tensors[0].dtype
    return [
        stepped(tensors[node.operand.slot], node.operand.steps)
        if isinstance(node.operand, Leaf)
        else constant(node.operand, device, dtype)
        for node in network.nodes
    ]
