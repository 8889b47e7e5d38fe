"""Which parameters of a model are trained, and how."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from einconv_kfac.curvature.text_table import table


class Training(dict[str, str]):
    """How each parameter is trained, by its name; prints as a table.

    ``"kfac"``, the name of the fallback, ``"frozen"``, or ``"left out"`` if the optimizer does
    not have the parameter.
    """

    def __str__(self) -> str:
        return table(("parameter", "trained by"), list(self.items()))


def training(
    model: nn.Module, own: Collection[str], covered: Collection[str], fallback: str
) -> Training:
    """Return how each parameter of a model is trained.

    Args:
        model: The model.
        own: Names of the optimizer's parameters.
        covered: Names of the parameters that factors cover.
        fallback: How the others are trained.
    """
    kinds = Training()
    for name, parameter in model.named_parameters():
        kind = "kfac" if name in covered else fallback
        kind = kind if name in own else "left out"
        kinds[name] = kind if parameter.requires_grad else "frozen"
    return kinds


def check_member(parameters: Iterable[nn.Parameter], names: Mapping[nn.Parameter, str]) -> None:
    """Raise a ``ValueError`` if a parameter is not the model's."""
    for parameter in parameters:
        if parameter not in names:
            shape = list(parameter.shape)
            raise ValueError(f"`params` must be parameters of `model`, got one of {shape}.")


def uncovered(model: nn.Module, names: Collection[str]) -> str:
    """Return what to say about parameters without Kronecker factors."""
    modules = dict(model.named_modules())
    kinds = {name: type(modules[name.rpartition(".")[0]]).__name__ for name in names}
    listed = ", ".join(f"'{name}' ({kind})" for name, kind in kinds.items())
    return (
        f"`strict`=True needs Kronecker factors for every parameter, got none for {listed}. "
        "Pass strict=False to train these by the fallback, or leave them out of `params`."
    )
