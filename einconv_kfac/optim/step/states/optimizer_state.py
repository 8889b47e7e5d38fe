"""The whole state of an optimizer: saved, loaded or restored, all of it or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from einconv_kfac.distributed.stored import all_stored
from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.curvature_state import CURVATURE_STATE_VERSION, check_version
from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.state_schema import Anything, Record
from einconv_kfac.optim.step.in_place import copy_
from einconv_kfac.optim.step.parameter_change import ParameterChange
from einconv_kfac.optim.step.states.carried_state import carry_, taken_out
from einconv_kfac.optim.step.states.memory_state import check_groups, check_memory, own_memory_
from einconv_kfac.optim.step.step_protocol import Step
from einconv_kfac.optim.vectors import Direction

PART = "kfac"
"""Key of what a saved state has beside that of torch's optimizers."""

MODES = frozenset({"automatic", "fixed"})
"""The names of the kinds of steps, under which their states are saved."""


@dataclass(frozen=True)
class OptimizerState:
    """The part of an optimizer's state that torch's optimizers lack.

    Args:
        curvature: Running curvature of the model.
        step: The kind of step.
        settings: Hyper-parameters.
        names: Names of the model's parameters.
    """

    curvature: RunningCurvature
    step: Step
    settings: Hyperparameters
    names: Mapping[nn.Parameter, str]

    @contextmanager
    def saving(self, optimizer: Optimizer, include_factors: bool) -> Iterator[None]:
        """Add the part to a state that is saved inside the block, before hooks see it.

        Args:
            optimizer: The optimizer.
            include_factors: See `RunningCurvature.state_dict`.
        """

        def add(_: Optimizer, state: dict[str, Any]) -> None:
            state[PART] = {
                "version": CURVATURE_STATE_VERSION,
                "preconditioner": self.curvature.state_dict(include_factors),
                self.step.mode: self.step.state_dict(),
            }
            names, whole = self._own_names(optimizer), self.curvature.stored.whole_states
            carry_(state, state[PART], names, whole)

        handle = optimizer.register_state_dict_post_hook(add, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def loading(self, optimizer: Optimizer) -> Iterator[None]:
        """Check a state that is loaded inside the block, after hooks have seen it, and load it.

        Hooks that run after loading find all of it loaded. After an error everything is as it
        was.

        Args:
            optimizer: The optimizer.
        """
        found: list[dict[str, Any]] = []
        whole: list[dict[str, Any]] = []

        def check(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            part, others = self._split(optimizer, state)
            self._check(optimizer, part, others)
            found.append(part)
            whole.append(others)
            return others

        def load(_: Optimizer) -> None:
            own_memory_(optimizer, whole[0], is_static=self.settings.capturable)
            self.curvature.load_state_dict(found[0]["preconditioner"])
            self.step.load_state_dict(found[0][self.step.mode], self._present())

        handles = (
            optimizer.register_load_state_dict_pre_hook(check),
            optimizer.register_load_state_dict_post_hook(load, prepend=True),
        )
        state, groups = optimizer.state, optimizer.param_groups
        undo = self.curvature.snapshot(), self.step.snapshot(self._present())
        try:
            yield
        except BaseException:
            if optimizer.state is not state:  # torch's part was loaded
                optimizer.state, optimizer.param_groups = state, groups
                for restore in undo:
                    restore()
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _own_names(self, optimizer: Optimizer) -> list[str]:
        """Return the names of an optimizer's parameters, in the order of its groups."""
        return [self.names[p] for group in optimizer.param_groups for p in group["params"]]

    def _split(self, optimizer: Optimizer, state: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the part that torch's optimizers lack, and the others, without it."""
        carried, memory = taken_out(state, self._own_names(optimizer))
        others = {name: own for name, own in state.items() if name != PART}
        part = state.get(PART, carried)
        return part, {**others, "state": memory} if "state" in state else others

    def _present(self) -> Direction:
        """Return the model's parameters by name."""
        return {name: parameter.detach() for parameter, name in self.names.items()}

    def _check(self, optimizer: Optimizer, part: Any, others: Mapping[str, Any]) -> None:
        """Raise a ``ValueError`` if a state cannot be loaded; nothing is changed.

        Args:
            optimizer: The optimizer.
            part: The part that torch's optimizers lack.
            others: Torch's part.
        """
        self.curvature.cover_unfrozen_()
        check_version(part)
        others_mode = MODES - {self.step.mode}
        if found := part.keys() & others_mode:
            raise ValueError(
                "`state_dict` must come from an optimizer with the same `adaptive`, got one of the "
                f"{', '.join(sorted(found))} step for the {self.step.mode} step. Load the state of "
                "the model alone, and begin with a new optimizer."
            )
        names = ("version", "preconditioner", self.step.mode)
        Record(dict.fromkeys(names, Anything())).check(repr(PART), part)
        self.curvature.check_state(part["preconditioner"])
        self.step.check_state(part[self.step.mode], self._present())
        check_groups(optimizer.param_groups, others, self.settings)
        check_memory(optimizer.param_groups, others, self.names)


@dataclass
class LastChange:
    """The changes of the parameters that end a step; none until then."""

    changes: Sequence[ParameterChange] = ()

    def apply_(self, changes: Sequence[ParameterChange]) -> None:
        """Change the parameters, as the last thing that happens."""
        self.changes = changes
        for change in changes:
            change.apply_()


@contextmanager
def restored_on_error(
    optimizer: Optimizer, curvature: RunningCurvature, step: Step, parameters: Direction
) -> Iterator[LastChange]:
    """Restore parameters and state, to the bit, after an error inside the block.

    Tensors of the optimizer's state are replaced, never changed in place, by what runs inside.
    Parameters are copied only for steps that change them before the end. Otherwise an interrupt
    that comes while they change comes after the step, which is then completed.

    Args:
        optimizer: The optimizer.
        curvature: Running curvature of the model.
        step: The kind of step.
        parameters: The parameters that the step may change, by name.
    """
    own = [*parameters.values()]
    owners = all_stored(own)
    undo = [curvature.snapshot(), step.snapshot(parameters), _memory_snapshot(optimizer, owners)]
    if step.moves_parameters:
        undo.append(_parameter_snapshot(own))
    last = LastChange()
    try:
        yield last
    except BaseException:
        if any(change.has_begun for change in last.changes):
            for change in last.changes:
                change.finish_()
        else:
            for restore in undo:
                restore()
        raise


def _parameter_snapshot(parameters: list[Tensor]) -> Callable[[], None]:
    """Return a function that restores parameters."""
    before = [torch.empty_like(parameter) for parameter in parameters]
    if before:
        torch._foreach_copy_(before, parameters)

    def restore() -> None:
        if before:
            copy_(parameters, before)

    return restore


def _memory_snapshot(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that restores what the optimizer keeps of each parameter."""
    known = [optimizer.state.get(parameter) for parameter in parameters]
    saved = [None if own is None else dict(own) for own in known]

    def restore() -> None:
        for parameter, own in zip(parameters, saved):
            if own is None:
                optimizer.state.pop(parameter, None)
            else:
                optimizer.state[parameter] = own

    return restore
