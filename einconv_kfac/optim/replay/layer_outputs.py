"""The outputs of layers in a forward pass, which Jacobian-vector products use again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from einconv_kfac.optim.replay.subsample import Subset
from einconv_kfac.torch_versions import packs_saved_tensors

LINEAR = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Modules that are linear in their input and in their parameters; subclasses may not be."""
NORMALIZING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NODES = ("NativeBatchNorm", "CudnnBatchNorm")


def is_known(module: nn.Module) -> bool:
    """Return whether Jacobian-vector products use what a module returned or computed."""
    return type(module) in LINEAR or type(module) in NORMALIZING


def parts_with_outputs(*wholes: nn.Module) -> list[nn.Module]:
    """Return the parts of a model whose outputs a loss inside of it may be computed from.

    These are layers with parameters, and all that `LayerOutputs` keeps.

    Args:
        wholes: The module that is called, and the model inside of it.
    """
    return [
        module
        for module in wholes[0].modules()
        if is_known(module)
        or (module._parameters and module not in wholes and not isinstance(module, ScriptModule))
    ]


@dataclass(frozen=True)
class _Output:
    """The output of one call of a layer; of batch normalisation, its statistics.

    Args:
        value: The output, or mean and inverse standard deviation, ``[2, c]``.
        version: The version counter of the tensor while it held that value.
    """

    value: Tensor
    version: int

    @property
    def is_intact(self) -> bool:
        """Whether no operation has changed the value in place."""
        return self.value._version == self.version


class LayerOutputs:
    """The outputs of linear layers, and the statistics of batch normalisation, by module."""

    def __init__(self) -> None:
        self._outputs: dict[nn.Module, list[_Output | None]] = {}
        self._dropped: set[nn.Module] = set()

    def keep_(self, module: nn.Module, output: Tensor) -> None:
        """Keep the output of one call; of checkpointed activations, keep that there is one."""
        kept: _Output | None = None
        if packs_saved_tensors():
            self.drop_(module)
        elif output.is_inference():
            kept = None  # no version would tell of a change in place
        elif type(module) in LINEAR:
            kept = _Output(output.detach(), output._version)
        elif (statistics := _statistics(output)) is not None:
            kept = _Output(statistics, 0)
        self._outputs.setdefault(module, []).append(kept)

    def drop_(self, module: nn.Module) -> None:
        """Keep no output of a module, since those of different calls could be confused."""
        self._dropped.add(module)

    def by_module(self) -> dict[nn.Module, list[Tensor | None]]:
        """Return the outputs in the order of calls; ``None`` for one that was changed since."""
        return {
            module: [o.value if o is not None and o.is_intact else None for o in outputs]
            for module, outputs in self._outputs.items()
            if module not in self._dropped
        }

    def restricted(self, subset: Subset) -> LayerOutputs:
        """Return the outputs for a subset of the examples.

        Modules are left out if the first dimension of an output is not that of the examples.
        """
        own = LayerOutputs()
        for module, outputs in self._outputs.items():
            whole = [o for o in outputs if o is not None and o.is_intact]
            if len(whole) == len(outputs) and all(o.value.shape[0] == subset.size for o in whole):
                own._outputs[module] = [_Output(o.value[subset.rows], o.version) for o in whole]
        own._dropped = self._dropped
        return own


def _statistics(output: Tensor) -> Tensor | None:
    """Return the statistics that torch keeps for the backward pass of batch normalisation."""
    node = output.grad_fn
    saved = [getattr(node, f"_saved_result{index}", None) for index in (1, 2)]
    if not str(node and node.name()).startswith(_NODES) or not all(
        isinstance(part, Tensor) and part.ndim == 1 and len(part) for part in saved
    ):
        return None
    return torch.stack([part.detach() for part in saved if isinstance(part, Tensor)])
