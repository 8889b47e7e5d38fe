"""Hyper-parameters of windows as the attributes of a layer."""

from __future__ import annotations

from typing import ClassVar, NoReturn

from torch.nn import Module

from einconv_kfac.geometry import Padding, Sizes, parse_padding
from einconv_kfac.geometry.spellings import as_flag, as_sizes
from einconv_kfac.modules.scripting import refuse_script


class WindowsNd(Module):
    """A layer without parameters, with the hyper-parameters of `unfoldNd`."""

    shown: ClassVar[tuple[str, ...]] = ("kernel_size", "dilation", "padding", "stride")
    """The attributes that ``repr`` shows, in order."""

    def __init__(
        self, kernel_size: Sizes, dilation: Sizes, padding: Padding, stride: Sizes, simplify: bool
    ) -> None:
        """Check the hyper-parameters, as far as possible without an input, and keep them."""
        sizes = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride}
        for name, value in sizes.items():
            as_sizes(value, name)
        if not isinstance(padding, str) or padding not in ("same", "valid"):
            parse_padding(padding, len(padding) if isinstance(padding, (tuple, list)) else 1)
        super().__init__()
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.padding = padding
        self.stride = stride
        self.simplify = as_flag(simplify, "simplify")

    def __prepare_scriptable__(self) -> NoReturn:
        """Raise a ``ValueError``: torch's layers have two dimensions."""
        refuse_script(type(self).__name__)

    def extra_repr(self) -> str:
        """Return the hyper-parameters as torch's layers show them."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.shown)
