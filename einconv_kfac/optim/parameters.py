"""Which parameters of a model are trained, and how."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.text_table import table
from einconv_kfac.optim.arguments import shown


class Training(dict[str, str]):
    """How each parameter is trained, by its name; prints as a table.

    ``"kfac"``, the name of the fallback, ``"frozen"``, or ``"left out"`` if the optimizer does
    not have the parameter.
    """

    def __str__(self) -> str:
        return table(("parameter", "trained by"), list(self.items()))


def training(
    model: nn.Module, own: Collection[nn.Parameter], covered: Collection[str], fallback: str
) -> Training:
    """Return how each parameter of a model is trained.

    Args:
        model: The model.
        own: The optimizer's parameters.
        covered: Names of the parameters that factors cover.
        fallback: How the others are trained.
    """
    kinds = Training()
    for name, parameter in model.named_parameters():
        kind = "kfac" if name in covered else fallback
        kind = kind if parameter in own else "left out"
        kinds[name] = kind if parameter.requires_grad else "frozen"
    return kinds


def parameters_of(model: nn.Module, params: Any) -> Any:
    """Return the argument ``params`` of an optimizer, or all parameters that a model trains.

    Raises:
        ValueError: If ``params`` cannot be parameters or groups.
    """
    if params is None:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not isinstance(params, (Iterable, Tensor)):  # torch refuses a tensor, and wrong entries
        raise ValueError(
            f"`params` must be an iterable of parameters or of groups, got {shown(params)}."
        )
    return params


def check_names(names: Any, model: nn.Module) -> tuple[str, ...] | None:
    """Return the argument ``parameters``: names of a model's parameters, or ``None`` for all.

    Raises:
        ValueError: If it is something else.
    """
    if names is None:
        return None
    if isinstance(names, (str, Tensor)) or not isinstance(names, Iterable):
        raise ValueError(f"`parameters` must be names of parameters, got {shown(names)}.")
    known, given = dict(model.named_parameters(remove_duplicate=False)), tuple(names)
    for name in given:
        if not isinstance(name, str) or name not in known:
            raise ValueError(
                f"`parameters` must be names of parameters of `model`, got {shown(name)}. Its "
                f"parameters are {shown(list(known))}."
            )
    return given


def check_member(
    parameters: Iterable[nn.Parameter], model: nn.Module, names: dict[nn.Parameter, str]
) -> None:
    """Raise a ``ValueError`` if a parameter is not the model's; name those that came later.

    Args:
        parameters: The parameters.
        model: The model.
        names: Names of the model's parameters; those of new ones are added.
    """
    present = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in parameters:
        if parameter not in present and parameter not in names:
            shape = list(parameter.shape)
            raise ValueError(f"`params` must be parameters of `model`, got one of {shape}.")
    for parameter, name in present.items():
        names.setdefault(parameter, name)


def owners_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module that has each parameter of a model, by the parameter's name."""
    return {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in model.named_modules()
        for name in module._parameters
    }


def assigned_parameters(
    known: Mapping[str, nn.Parameter], owners: Mapping[str, nn.Module], model: nn.Module
) -> dict[str, nn.Parameter]:
    """Return parameters that were assigned to the modules that had others, by name.

    As by ``load_state_dict(assign=True)``. Those of other modules, shapes or types do not count.

    Args:
        known: Parameters by name, as they were.
        owners: The modules that had them.
        model: The model.
    """
    present, modules = dict(model.named_parameters()), set(model.modules())
    changed = {n: present[n] for n, p in known.items() if n in present and present[n] is not p}
    return {
        name: new
        for name, new in changed.items()
        if owners.get(name) in modules
        and (new.shape, new.dtype) == (known[name].shape, known[name].dtype)
    }


def check_present(known: Mapping[str, nn.Parameter], present: Mapping[str, nn.Parameter]) -> None:
    """Raise a ``RuntimeError`` if a model's parameters were replaced, renamed or removed.

    Args:
        known: Parameters by name, as they were.
        present: The model's parameters by name.
    """
    for name, parameter in known.items():
        if present.get(name) is not parameter:
            what = "another one" if name in present else "no such parameter"
            raise RuntimeError(
                f"`model` must have the parameters that it had when the optimizer was made, got "
                f"{what} for '{name}'. Make a new optimizer after load_state_dict(assign=True), "
                "a new layer, an adapter or a parametrization."
            )


def check_dense(name: str, gradient: Tensor) -> None:
    """Raise a ``RuntimeError`` if a gradient is sparse.

    Args:
        name: Name of the parameter.
        gradient: Its gradient.
    """
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"The gradient of '{name}' must be dense, got a sparse gradient ({gradient.layout}). "
            "Make its layer without sparse gradients (nn.Embedding(.., sparse=False)), or train "
            "it by another optimizer (torch.optim.SparseAdam): leave it out of `params`."
        )


def check_gaps(model: nn.Module, coverage: Training, fallback: str) -> None:
    """Raise a ``ValueError`` if the fallback trains a parameter.

    Args:
        model: The model.
        coverage: How each parameter is trained.
        fallback: Name of the fallback.
    """
    names = [name for name, kind in coverage.items() if kind == fallback]
    if not names:
        return
    modules = dict(model.named_modules())
    kinds = {name: type(modules[name.rpartition(".")[0]]).__name__ for name in names}
    listed = ", ".join(f"'{name}' ({kind})" for name, kind in kinds.items())
    raise ValueError(
        f"`strict`=True needs Kronecker factors for every parameter, got none for {listed}. "
        "Pass strict=False to train these by the fallback, or leave them out of `params`."
    )
