"""The coverage of a model's parameters by layers, with reasons for gaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from einconv_kfac.curvature.layers.discovery import discovered, refusal
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

    Raises:
        ValueError: If a layer's parameters do not exist yet.

    >>> coverage(nn.Sequential(nn.Linear(2, 3), nn.PReLU()))
    parameter  type    block  why not
    0.weight   Linear  0
    0.bias     Linear  0
    1.weight   PReLU   -      no rule covers PReLU; `register_layer` adds one
    """
    layers, reasons = discovered(model, every=True)
    owners = {name: layer.name for layer in layers for name in layer.parameters}
    return Coverage(list(_rows(model, owners, reasons)))


def _rows(
    model: nn.Module, owners: dict[str, str], reasons: dict[str, str]
) -> Iterator[ParameterCoverage]:
    """Yield the rows in the order of the model's parameters."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        path = path.partition("parametrizations")[0].rstrip(".")  # torch keeps the originals there
        module, reason = modules[path], ""
        if name not in owners:
            reason = reasons.get(name) or refusal(path, module) or "another module uses it unseen"
            reason = reason if parameter.requires_grad else "it is frozen"
        kind = nn.utils.parametrize.type_before_parametrizations(module).__name__
        yield ParameterCoverage(name, owners.get(name), kind, reason)
