"""Conversion of a model's torch convolutions to the layers of this package."""

from __future__ import annotations

from itertools import chain
from typing import TypeGuard, TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from einconv_kfac.geometry.spellings import as_flag
from einconv_kfac.modules.conv import ConvNd
from einconv_kfac.modules.conv_transpose import ConvTransposeNd

Model = TypeVar("Model", bound=nn.Module)

_KINDS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)

_BEHAVIOUR = ("__call__", "__getattr__", "__getstate__", "__setattr__", "__setstate__")
"""Special methods by which a subclass may compute or keep something else."""


def convert(model: Model, simplify: bool = True) -> Model:
    """Replace every torch convolution in a model by the layer of this package, in place.

    The new layers share parameters, buffers and hooks with the old ones and have their names. A
    layer that appears several times in the model is replaced by one layer. Layers that compute
    something else are not replaced: subclasses with methods or attributes of their own,
    parametrized layers, and lazy layers before their initialisation.

    Args:
        model: A model, or a convolution; for a convolution the new layer is returned.
        simplify: As in `einconv_kfac.functionals.convNd`.

    Returns:
        The model.

    Raises:
        TypeError: If the model is no module, or ``simplify`` is not a truth value.

    >>> from torch.nn import Conv2d, ReLU, Sequential
    >>> convert(Sequential(Conv2d(1, 4, 3), ReLU()))
    Sequential(
      (0): ConvNd(2, 1, 4, kernel_size=(3, 3), stride=(1, 1))
      (1): ReLU()
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {model!r}.")
    as_flag(simplify, "simplify")
    counterparts: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and _convertible(child):
                if child not in counterparts:
                    counterparts[child] = _counterpart(child, simplify)
                parent._modules[name] = counterparts[child]
    return _counterpart(model, simplify) if _convertible(model) else model  # type: ignore[return-value]


def _convertible(module: nn.Module) -> TypeGuard[_ConvNd]:
    """Return whether a module computes what torch's convolutions compute."""
    kind = next((kind for kind in _KINDS if isinstance(module, kind)), None)
    if kind is None or isinstance(module, LazyModuleMixin) or is_parametrized(module):
        return False
    bases = type(module).__mro__
    return not any(map(_is_own, chain(*map(vars, bases[: bases.index(kind)]))))


def _is_own(name: str) -> bool:
    """Return whether a name in a subclass is of behaviour that its replacement would not have."""
    if name.startswith("__") and name.endswith("__"):
        return name in _BEHAVIOUR
    return name != "extra_repr"


def _counterpart(module: _ConvNd, simplify: bool) -> nn.Module:
    """Return the layer of this package with all attributes of the module."""
    kind: type[_ConvNd] = ConvTransposeNd if isinstance(module, _ConvTransposeNd) else ConvNd
    layer = kind.__new__(kind)
    layer.__dict__.update(module.__dict__, N=len(module.kernel_size), simplify=simplify)
    return layer
