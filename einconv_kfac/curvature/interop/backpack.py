"""Grouped convolutions for BackPACK (``pip install einconv-kfac[backpack]``)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from einconv_kfac.curvature.factors import conv_output_factor
from einconv_kfac.curvature.layers.layer_registry import layer_rule


def _grouped(base: Any) -> Any:
    """Return a subclass of BackPACK's rule for convolutions that supports channel groups."""

    class Grouped(base):  # type: ignore[misc]
        def weight(self, ext: Any, module: Any, *backward: Any) -> Any:
            """Return ``[B, A]``, stacked over groups if there are several."""
            if module.groups > 1:
                return _factors(module, backward[-1])
            return super().weight(ext, module, *backward)

    return Grouped


def with_groups(extension: Any) -> Any:
    """Add convolutions with channel groups to BackPACK's ``KFAC()`` or ``KFLR()``.

    One ``backward`` then fills ``weight.kfac`` (or ``kflr``) of every convolution with
    ``[B, A]``. For one group these are BackPACK's own matrices, for several they are stacks
    ``[g, co, co]`` and ``[g, d, d]``. The scaling is BackPACK's: ``A = 1/N sum_{n,s} a a^T``, and
    ``B`` is the second moment of gradients that are first summed over positions. If positions are
    independent, that is ``S`` times the ``B`` of KFC (Grosse and Martens, 2016).

    Args:
        extension: ``backpack.extensions.KFAC()`` or ``KFLR()``; it is changed in place.

    Raises:
        ImportError: If BackPACK is not installed.
        ValueError: If the extension is another one.
    """
    try:
        hbp = import_module("backpack.extensions.secondorder.hbp")
    except ImportError as error:
        raise ImportError(
            "This extension needs BackPACK: pip install einconv-kfac[backpack]"
        ) from error
    if getattr(extension, "savefield", None) not in {"kfac", "kflr"}:
        name = type(extension).__name__
        raise ValueError(f"`extension` must be BackPACK's KFAC or KFLR, got {name}.")
    for name in ("conv", "conv_transpose"):
        base = getattr(getattr(hbp, f"{name}nd"), f"HBP{_camel(name)}Nd")
        for n in (1, 2, 3):
            kind = getattr(nn, f"{_camel(name)}{n}d")
            extension.set_module_extension(kind, _grouped(base)(n), overwrite=True)
    return extension


def _factors(module: Any, backproped: Tensor) -> list[Tensor]:
    """Return ``[B, A]`` from the root vectors of BackPACK at the output, ``[v, n, c, *s]``."""
    rule = layer_rule(module)
    assert rule is not None
    a = rule.input_factor(module, module.input0, module.output.shape, "expand", False)
    examples = float(backproped.shape[1])
    b = conv_output_factor(backproped, module.groups, "reduce", alpha=examples)
    return [b, a]


def _camel(name: str) -> str:
    """Return a name in camel case, such as ``ConvTranspose``."""
    return "".join(part.capitalize() for part in name.split("_"))
