"""Which parameters of a model are trained, and how."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from einconv_kfac.curvature.arguments import shown
from einconv_kfac.curvature.layers.coverage import layer_coverage
from einconv_kfac.curvature.layers.discovery import find_layers
from einconv_kfac.curvature.text_table import table


class Training(dict[str, str]):
    """How each parameter is trained, by its name; prints as a table, with the reasons.

    ``"kfac"``, the name of the fallback, ``"frozen"``, or ``"left out"`` if the optimizer does
    not have the parameter.

    Attributes:
        reasons: Why the fallback trains a parameter, by its name.
        losses: What the losses so far were taken as: operations with the matrix that each has in
            the curvature, and operations without one.
    """

    def __init__(self, losses: Sequence[str] = ()) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}
        self.losses = tuple(losses)

    def __str__(self) -> str:
        rows = [(name, self._shown(name)) for name in self]
        own = [f"loss, {line}" for line in self.losses]
        return "\n".join([table(("parameter", "trained by"), rows), *own])

    def _shown(self, name: str) -> str:
        """Return how a parameter is trained, and the reason."""
        return f"{self[name]}: {self.reasons[name]}" if name in self.reasons else self[name]


def training(
    model: nn.Module,
    own: Collection[nn.Parameter],
    covered: Collection[str],
    fallback: str,
    losses: Sequence[str] = (),
) -> Training:
    """Return how each parameter of a model is trained.

    Args:
        model: The model.
        own: The optimizer's parameters.
        covered: Names of the parameters that factors cover.
        fallback: How the others are trained.
        losses: What the losses so far were taken as.
    """
    kinds = Training(losses)
    for name, parameter in model.named_parameters():
        kind = "kfac" if name in covered else fallback
        kind = kind if parameter in own else "left out"
        kinds[name] = kind if parameter.requires_grad else "frozen"
    gaps = [name for name, kind in kinds.items() if kind == fallback]
    if gaps:
        known = _reasons(model)
        kinds.reasons = {name: known[name] for name in gaps if name in known}
    return kinds


EXCLUDED = "its layer is left out by `exclude`, or has no weight in `params`"


def _reasons(model: nn.Module) -> dict[str, str]:
    """Return why parameters that are not covered are not, by name."""
    reasons = {
        row.parameter: row.reason or EXCLUDED for row in layer_coverage(model, computed=True)
    }
    preconditioned = {
        name for layer in find_layers(model, computed=True) for name in layer.parameters
    }
    for name, reason in reasons.items():
        if reason == EXCLUDED and name not in preconditioned:
            reasons[name] = "layers of its type are not preconditioned by default"
    return reasons


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
    known, given = dict(nn.Module.named_parameters(model, remove_duplicate=False)), tuple(names)
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
            raise ValueError(
                "`params` must be parameters of `model`, got another one of shape "
                f"{list(parameter.shape)}. Pass a module that contains all that is trained, whose "
                "`forward` may return the loss, or train other parameters, as those of a loss, by "
                "another optimizer."
            )
    for parameter, name in present.items():
        names.setdefault(parameter, name)


def owners_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module that has each parameter of a model, by the parameter's name."""
    return {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in model.named_modules()
        for name, _ in module._parameters.items()  # those of TorchScript have no iterator
    }


def assigned_parameters(
    known: Mapping[str, nn.Parameter],
    owners: Mapping[str, nn.Module],
    model: nn.Module,
    present: Mapping[str, nn.Parameter],
) -> dict[str, nn.Parameter]:
    """Return parameters that were assigned to the modules that had others, by name.

    As by ``load_state_dict(assign=True)``. Those of other modules, shapes or types do not count.

    Args:
        known: Parameters by name, as they were.
        owners: The modules that had them.
        model: The model.
        present: Its parameters by name.
    """
    changed = {n: present[n] for n, p in known.items() if n in present and present[n] is not p}
    modules = set(model.modules()) if changed else set()
    return {
        name: new
        for name, new in changed.items()
        if owners.get(name) in modules and _form(new) == _form(known[name])
    }


def _form(parameter: nn.Parameter) -> tuple[object, ...]:
    """Return what a parameter and one that is assigned in its place must have in common."""
    return parameter.shape, parameter.dtype, type(parameter.data)


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


def check_dense(gradients: Iterable[tuple[str, Tensor]]) -> None:
    """Raise a ``RuntimeError`` if a gradient is sparse.

    Args:
        gradients: Names of parameters, and their gradients.
    """
    for name, gradient in gradients:
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"The gradient of '{name}' must be dense, got a sparse gradient "
                f"({gradient.layout}). Make its layer without sparse gradients "
                "(nn.Embedding(.., sparse=False)), or train it by another optimizer "
                "(torch.optim.SparseAdam): leave it out of `params`."
            )


def check_gaps(model: nn.Module, coverage: Training, fallback: str, strict: bool) -> None:
    """Refuse parameters that the fallback trains, or warn if they are most of the entries.

    Layers that are left out on purpose do not count for the warning.

    Args:
        model: The model.
        coverage: How each parameter is trained.
        fallback: Name of the fallback.
        strict: Whether to refuse any.

    Raises:
        ValueError: If ``strict`` and there is one.
    """
    gaps = [name for name, kind in coverage.items() if kind == fallback]
    if strict and gaps:
        raise ValueError(_uncovered(model, gaps))
    entries = {name: parameter.numel() for name, parameter in model.named_parameters()}
    unseen = Counter[str]()
    for name in gaps:
        if coverage.reasons.get(name) != EXCLUDED:
            unseen[_kind(model, name)] += entries[name]
    missing = unseen.total()
    covered = sum(entries[name] for name, kind in coverage.items() if kind == "kfac")
    if missing > covered:
        listed = ", ".join(f"{kind} ({count:,})" for kind, count in unseen.most_common(3))
        warnings.warn(
            f"Kronecker factors cover {covered:,} of {covered + missing:,} trained numbers; the "
            f"fallback ({fallback}) trains the others, most of them in {listed}. `coverage()` has "
            "the reasons; `einconv_kfac.curvature.register_layer` adds a rule.",
            UserWarning,
            stacklevel=4,
        )


def _kind(model: nn.Module, name: str) -> str:
    """Return the type of the module that owns a parameter."""
    module = model.get_submodule(name.rpartition(".")[0].partition(".parametrizations")[0])
    return type_before_parametrizations(module).__name__


def _uncovered(model: nn.Module, names: Collection[str]) -> str:
    """Return what to say about parameters without Kronecker factors."""
    modules = dict(model.named_modules())
    kinds = {name: type(modules[name.rpartition(".")[0]]).__name__ for name in names}
    listed = ", ".join(f"'{name}' ({kind})" for name, kind in kinds.items())
    raise ValueError(
        f"`strict`=True needs Kronecker factors for every parameter, got none for {listed}. "
        "Pass strict=False to train these by the fallback, or leave them out of `params`."
    )
