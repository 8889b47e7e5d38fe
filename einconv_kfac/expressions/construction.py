"""Networks from a convolution and sizes: checked, and cached."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from einconv_kfac.geometry import Geometry
from einconv_kfac.geometry.spellings import as_integer
from einconv_kfac.network import Network, cached

Parameters = ParamSpec("Parameters")


def built(function: Callable[Parameters, Network]) -> Callable[Parameters, Network]:
    """Cache an operation's network, and check the convolution and the sizes that it is made of.

    The network's function raises TypeError if ``geometry`` is no `Geometry` or a size is not an
    integer, and ValueError if a size is negative.
    """
    names = tuple(inspect.signature(function).parameters)
    build: Callable[..., Network] = cached(maxsize=1024)(function)

    @wraps(function)
    def network(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Network:
        for name, value in (*zip(names, args), *kwargs.items()):
            if name != "geometry":
                as_integer(value, name, minimum=0)
            elif not isinstance(value, Geometry):
                raise TypeError(f"`geometry` must be a `Geometry`, got {value!r}.")
        return build(*args, **kwargs)

    return network
