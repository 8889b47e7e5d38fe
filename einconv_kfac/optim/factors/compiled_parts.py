"""Compiled models and parts of models, where no hook sees the calls of layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from einconv_kfac.curvature.estimation.capture import LayerCapture
from einconv_kfac.curvature.objective.graph import has_compiled_code

UNSEEN = (
    "Compiled models: pass `torch.compile(model)` itself here and call that. Checkpointed layers: "
    "pass use_reentrant=False. Layers that only another loss reaches: name them in `exclude`. "
    "Parts of the model that are called by themselves after the first step only: call each once "
    "before it, `model.encoder(x)`. Models that return no tensors: return them, or a tuple, a "
    "mapping or an object that has them. Models called by torch.vmap, and losses of derivatives of "
    "the model alone: do this in the `forward` of a module that returns the result, and pass that "
    "module."
)


def compiled_parts(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Return the names of the outermost compiled modules that contain one of several layers.

    Args:
        model: The model.
        layers: Names of layers.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(_contains(other, name) for other in found)
        is_used = any(_contains(name, layer) for layer in layers)
        if _is_compiled(module) and is_used and not is_inside:
            found.append(name)
    return found


def may_be_compiled(
    model: nn.Module, layers: Collection[str], outputs: Sequence[Tensor | GradientEdge]
) -> bool:
    """Return whether layers whose calls no hook saw may run in compiled code.

    Args:
        model: The model.
        layers: Names of the layers.
        outputs: Outputs of the model.
    """
    return bool(compiled_parts(model, layers)) or has_compiled_code(outputs)


def advice(parts: Sequence[str]) -> str:
    """Return what to write where no calls were seen.

    Args:
        parts: The parts of a model that are compiled by themselves.
    """
    if not parts:
        return UNSEEN
    names = ", ".join(f"'{name}'" if name else "the model" for name in parts)
    return (
        f"Compiled by itself is {names}: compile the whole model in place of it, by "
        "`model = torch.compile(model)`, make the optimizer of that, and call that."
    )


def _is_compiled(module: nn.Module) -> bool:
    """Return whether a module was compiled, in place or by ``torch.compile(module)``."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def _contains(outer: str, inner: str) -> bool:
    """Return whether a module, by its name, is another one or contains it."""
    return not outer or inner == outer or inner.startswith(f"{outer}.")


def run_uncompiled_(compiled: nn.Module, capture: LayerCapture) -> Callable[[], None]:
    """Have a compiled model run uncompiled while calls are captured; return what undoes that."""
    fast, plain = compiled.forward, cast("nn.Module", compiled._orig_mod)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (plain if capture.runs_recorded else fast)(*args, **kwargs)

    def undo() -> None:
        compiled.forward = fast

    compiled.forward = forward
    return undo
