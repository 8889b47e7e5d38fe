"""The input factors of the layers of real networks, and what the device can do at most."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from factor_contestants import CONTESTANTS, OURS
from factor_layers import Layer, layers
from gpu_lab import PRECISIONS, Lab, with_precision
from torch import Tensor

from einconv_kfac.curvature.factors import conv_input_factor
from einconv_kfac.curvature.factors.choice import applicable, choose
from einconv_kfac.curvature.factors.problem import Problem

LAUNCHES = 1000


def rates(lab: Lab) -> None:
    """Measure copies, products and launches."""
    lab.measure("rates", "device", 10, partial(_rates, lab))


def _rates(lab: Lab) -> dict[str, Any]:
    """Return terabytes and teraflops per second, and microseconds per launch."""
    size, elements = (256, 1 << 20) if lab.quick else (8192, 1 << 29)
    x = torch.randn(elements, device=lab.device)
    y = torch.empty_like(x)
    copied = lab.milliseconds(partial(y.copy_, x))
    found: dict[str, Any] = {"torch": torch.__version__, "copy TB/s": 8e-9 * elements / copied}
    for name in PRECISIONS:
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        a, b = (torch.randn(size, size, device=lab.device, dtype=dtype) for _ in range(2))
        with with_precision(name):
            found[f"{name} TFLOP/s"] = 2e-9 * size**3 / lab.milliseconds(partial(torch.mm, a, b))
    small = torch.zeros(64, device=lab.device)

    def many() -> None:
        for _ in range(LAUNCHES):
            small.add_(1)

    found["us/launch"] = 1e3 * lab.milliseconds(many) / LAUNCHES
    return found


def factors(lab: Lab) -> None:
    """Measure each layer in each precision: our algorithms, im2col, einconv and curvlinops."""
    found = [layer for layer in layers() if not layer.transposed]
    if lab.quick:
        found = sorted(found, key=lambda layer: math.prod(layer.shape) * layer.result_size)[:2]
    for layer in found:
        for name in PRECISIONS:
            lab.measure("factors", f"{layer} {name}", 6, partial(_factor, lab, layer, name))


def _factor(lab: Lab, layer: Layer, precision: str) -> dict[str, Any]:
    """Return time, memory and error of each way to compute a layer's factor."""
    batch = 2 if lab.quick else 64
    x = torch.randn(batch, *layer.shape[1:], generator=torch.Generator().manual_seed(0))
    x = x.bfloat16() if precision == "bfloat16" else x
    reference = conv_input_factor(x[:2].double(), **layer.options)
    x = x.to(lab.device)
    channels = x.shape[1] // layer.groups
    problem = Problem(layer.geometry, batch, channels, x.dtype, lab.device.type)
    found: dict[str, Any] = {"choice": choose(problem), "network": layer.network}
    with with_precision(precision):
        for name in applicable(problem):
            options: dict[str, Any] = {**layer.options, "algorithm": name}
            call: Callable[[Tensor], Tensor] = partial(conv_input_factor, **options)
            found[name] = _of_call(lab, partial(call, x)) | _error(call(x[:2]), reference)
        if precision != "bfloat16":
            found |= _contestants(lab, layer, x)
    return found


def _contestants(lab: Lab, layer: Layer, x: Tensor) -> dict[str, Any]:
    """Return time and memory of other ways, or why there is none."""
    found: dict[str, Any] = {}
    for name, make in CONTESTANTS.items():
        call = None if name == OURS else make(layer, "expand")
        if call is not None:
            try:
                found[f"by {name}"] = _of_call(lab, partial(call, x))
            except (RuntimeError, ValueError) as error:  # out of memory, for example
                found[f"by {name}"] = f"{type(error).__name__}: {str(error)[:80]}"
    return found


def _of_call(lab: Lab, call: Callable[[], Any]) -> dict[str, Any]:
    """Return the time and the peak of memory of a call."""
    return {"ms": lab.milliseconds(call, 0.15), "MB": lab.peak_megabytes(call)}


def _error(found: Tensor, reference: Tensor) -> dict[str, Any]:
    """Return the relative error in the Frobenius norm, and whether the factor is symmetric."""
    error = (found.cpu().double() - reference).norm() / reference.norm()
    return {"error": float(error), "symmetric": bool(torch.equal(found, found.mT))}
