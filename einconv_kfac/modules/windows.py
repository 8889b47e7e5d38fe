"""Hyper-parameters of windows as the attributes of a layer."""

from __future__ import annotations

from typing import ClassVar

from torch.nn import Module

from einconv_kfac.geometry import Padding, Sizes


class WindowsNd(Module):
    """A layer without parameters, with the hyper-parameters of `unfoldNd`."""

    shown: ClassVar[tuple[str, ...]] = ("kernel_size", "dilation", "padding", "stride")
    """The attributes that ``repr`` shows, in order."""

    def __init__(
        self, kernel_size: Sizes, dilation: Sizes, padding: Padding, stride: Sizes, simplify: bool
    ) -> None:
        """Keep the hyper-parameters."""
        super().__init__()
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.padding = padding
        self.stride = stride
        self.simplify = simplify

    def extra_repr(self) -> str:
        """Return the hyper-parameters as torch's layers show them."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.shown)
