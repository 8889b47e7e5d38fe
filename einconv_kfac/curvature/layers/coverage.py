"""The coverage of a model's parameters by layers, with reasons for gaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from einconv_kfac.curvature.layers.discovery import discovered, refusal
from einconv_kfac.curvature.layers.layer_registry import layer_rule
from einconv_kfac.curvature.module_arguments import check_module
from einconv_kfac.curvature.text_table import table


@dataclass(frozen=True)
class ParameterCoverage:
    """The coverage of one parameter.

    Args:
        parameter: Its name in the model.
        layer: The layer whose block covers it, or ``None``.
        kind: Type of the module that owns it.
        reason: The reason why it is not covered; empty if it is.
    """

    parameter: str
    layer: str | None
    kind: str
    reason: str


class Coverage(Sequence[ParameterCoverage]):
    """The coverage of each parameter of a model; prints as a table."""

    def __init__(self, rows: Sequence[ParameterCoverage]) -> None:
        self._rows = tuple(rows)

    def __getitem__(self, index: int) -> ParameterCoverage:  # type: ignore[override]
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def gaps(self) -> Coverage:
        """Return the parameters that are not covered."""
        return Coverage([row for row in self._rows if row.layer is None])

    def __repr__(self) -> str:
        cells = [
            (
                row.parameter,
                row.kind,
                "-" if row.layer is None else row.layer or "(model)",
                row.reason,
            )
            for row in self._rows
        ]
        return table(("parameter", "type", "block", "why not"), cells)


def coverage(model: nn.Module) -> Coverage:
    """Return the block of `kronecker_factors` that covers each parameter, or why none does.

    >>> coverage(nn.Sequential(nn.Linear(2, 3), nn.PReLU()))
    parameter  type    block  why not
    0.weight   Linear  0
    0.bias     Linear  0
    1.weight   PReLU   -      no rule covers PReLU; `register_layer` adds one
    """
    check_module(model, "coverage(model)")
    return layer_coverage(model, computed=False)


def layer_coverage(model: nn.Module, *, computed: bool) -> Coverage:
    """Return the layer that covers each parameter, or why none does.

    Args:
        model: The model.
        computed: Whether layers may compute their weight from parameters, see `find_layers`.
    """
    layers, reasons = discovered(model, every=True, computed=computed)
    owners = {name: layer.name for layer in layers for name in layer.parameters}
    return Coverage(list(_rows(model, owners, reasons, computed=computed)))


_NO_OWNER = (
    "The parameters of the model must be attributes of its modules, got '{}', which no module has. "
    "The model keeps networks apart from their parameters, as loss modules of torchrl do. Make it "
    "with functional=False, or compute the loss from the networks themselves."
)


def _rows(
    model: nn.Module, owners: dict[str, str], reasons: dict[str, str], *, computed: bool
) -> Iterator[ParameterCoverage]:
    """Yield the rows in the order of the model's parameters."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, own = _owner(name, modules)
        if path not in modules:
            raise ValueError(_NO_OWNER.format(name))
        module, reason = modules[path], ""
        if name not in owners:
            reason = reasons.get(name) or _refusal(path, module, own, computed=computed)
            reason = reason if parameter.requires_grad else "it is frozen"
        kind = nn.utils.parametrize.type_before_parametrizations(module).__name__
        yield ParameterCoverage(name, owners.get(name), kind, reason)


def _owner(name: str, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """Return the name of the module that owns a parameter, and the parameter's name in it."""
    path, _, own = name.rpartition(".")
    outer, inside, _ = f".{path}".rpartition(".parametrizations.")  # torch keeps originals there
    is_original = inside and nn.utils.parametrize.is_parametrized(modules[outer[1:]])
    return (outer[1:], own) if is_original else (path, own)


def _refusal(path: str, module: nn.Module, own: str, *, computed: bool) -> str:
    """Return the reason why a parameter that no module shares is not covered.

    Args:
        path: Name of the module that owns it.
        module: That module.
        own: The parameter's name in it.
        computed: See `layer_coverage`.
    """
    rule = layer_rule(module)
    if rule is None:
        return str(refusal(path, module))
    parts = rule.parts(module)
    found = [part for part in parts if own in (part.weight, part.bias)]
    reason = refusal(path, module, (found or parts)[0], computed=computed)
    unseen = "another module uses it unseen" if found else None
    return reason or unseen or f"the rule of {type(module).__name__} leaves it out"
