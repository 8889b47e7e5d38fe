"""Parameters copied from another layer."""

from __future__ import annotations

from torch.nn import Parameter
from torch.nn.modules.conv import _ConvNd


def adopt_(layer: _ConvNd, source: _ConvNd) -> None:
    """Give a layer copies of another's parameters, and its training flag."""
    for name in ("weight", "bias"):
        parameter: Parameter | None = getattr(source, name)
        if parameter is not None:
            copy = parameter.detach().clone()
            parameter = Parameter(copy, requires_grad=parameter.requires_grad)
        setattr(layer, name, parameter)
    layer.train(source.training)
