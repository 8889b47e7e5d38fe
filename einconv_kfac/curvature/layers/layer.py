"""A layer that a rule covers, and its parameters as matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.layers.computed_weight import NamedWeight
from einconv_kfac.curvature.layers.layer_rule import LayerRule


@dataclass(frozen=True)
class Use:
    """A module that uses a layer's parameters.

    Args:
        module: The module.
        rule: The rule for its type.
        transposed: Whether it multiplies with the transposes of the layer's matrices. Its inputs
            then belong to their rows, and its output gradients to their columns: ``B`` and ``A``.
    """

    module: nn.Module
    rule: LayerRule
    transposed: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer with a rule, and how its parameters form its matrices.

    Args:
        name: Its name in the model.
        modules: The modules that use its parameters; several if they share them.
        rule: The rule for the type of the first.
        layout: Its weight and bias as matrices ``[g, co, d]``. A computed weight has the name that
            it would have as a parameter.
        uses: One entry per module, where they differ in type: a tied embedding and output layer.
        computed: How the weight is computed from parameters, or ``None`` if it is one.
        computed_bias: How the bias is computed from its parameter, beside a computed weight.

    Attributes:
        module: The first module.
        weight: Name of the weight in the model, or of the first parameter that it is computed from.
        bias: Name of the bias in the model, or ``None`` if there is none that is trained.
        parameters: Names of the parameters that the layer's factors cover.
    """

    name: str
    modules: tuple[nn.Module, ...]
    rule: LayerRule
    layout: Layout
    uses: tuple[Use, ...] = ()
    computed: NamedWeight | None = field(default=None, compare=False)
    computed_bias: NamedWeight | None = field(default=None, compare=False)
    # stored, since every step of an optimizer reads them for every layer
    module: nn.Module = field(init=False, repr=False, compare=False)
    weight: str = field(init=False, repr=False, compare=False)
    bias: str | None = field(init=False, repr=False, compare=False)
    parameters: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.uses:
            uses = tuple(Use(module, self.rule) for module in self.modules)
            object.__setattr__(self, "uses", uses)
        object.__setattr__(self, "module", self.modules[0])
        names = self.layout.parameters
        if self.computed is not None:
            names = (*self.computed.parameters, *names[1:])
        object.__setattr__(self, "weight", names[0])
        object.__setattr__(self, "bias", self.layout.bias)
        object.__setattr__(self, "parameters", names)

    @property
    def is_tied(self) -> bool:
        """Whether some modules multiply with the transposed matrices, and others do not."""
        return any(use.transposed for use in self.uses)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.module.parameters()).device

    def use_of(self, module: nn.Module) -> Use:
        """Return how one of the modules uses the parameters."""
        if self.uses[0].module is module:
            return self.uses[0]
        return next(use for use in self.uses if use.module is module)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, without those that were removed since."""
        own = dict(self.module.named_parameters(recurse=False))
        found = zip(self.layout.parameters, (self.rule.weight, self.rule.bias))
        known = {name: own[attribute] for name, attribute in found if attribute in own}
        return known if self.computed is None else {**self.computed.tensors(), **known}

    def zeros(self) -> dict[str, Tensor]:
        """Return zeros like the weight and the bias, by their names in the layout."""
        tensors = self.tensors()
        known = {self.layout.weight: tensors[self.weight]} if self.weight in tensors else {}
        known |= {name: tensors[name] for name in self.layout.parameters if name in tensors}
        return {name: torch.zeros_like(tensor) for name, tensor in known.items()}

    def to_matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return gradients by parameter name as one matrix per group, ``[g, co, d]``."""
        return self.layout.to_matrix(self.with_weight(tensors))

    def with_weight(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients of the weight and the bias, also where they are computed."""
        found = {name: gradients[name] for name in self.layout.parameters if name in gradients}
        if self.computed is not None:
            found[self.layout.weight] = self.computed.gradient(gradients)
        if self.computed_bias is not None and self.bias in found:
            found[self.bias] = self.computed_bias.gradient(gradients)
        return found

    def without_weight(self, steps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the steps of parameters for those of the weight and the bias."""
        found = {name: steps[name] for name in self.layout.parameters if name in steps}
        if self.computed is not None and self.layout.weight in found:
            found |= self.computed.steps(found.pop(self.layout.weight))
        if self.computed_bias is not None and self.bias in found:
            found |= self.computed_bias.steps(found[self.bias])
        return found

    def effective(
        self, parameters: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what a layer multiplies with and adds, and its change by an update, by name.

        Args:
            parameters: The parameters by name.
            update: The update; zero for parameters that it lacks.
        """
        computed = [own for own in (self.computed, self.computed_bias) if own is not None]
        values = {own.name: own.value(parameters) for own in computed}
        return values, {own.name: own.change(parameters, update) for own in computed}

    def has_parameters(self, module: nn.Module) -> bool:
        """Return whether one of the modules has its parameters, and no tensors in their place."""
        own = [*module._parameters.values()]
        if self.computed is not None:
            own += self.computed.computed.owner._parameters.values()
        return all(isinstance(parameter, (nn.Parameter, NoneType)) for parameter in own)

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return matrices ``[g, co, d]`` as tensors by parameter name."""
        return self.layout.from_matrix(matrix)
