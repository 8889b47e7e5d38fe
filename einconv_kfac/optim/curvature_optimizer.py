"""What `KFAC` shows and saves: groups, coverage, statistics and state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from einconv_kfac.curvature.arguments import flag, shown
from einconv_kfac.curvature.estimation.preservation import without_gradients
from einconv_kfac.optim.diagnostics import Report, description
from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.model_walk import named_parameters
from einconv_kfac.optim.parameters import Training, check_member, training
from einconv_kfac.optim.step.fallback import Fallback
from einconv_kfac.optim.step.runner import StepRunner
from einconv_kfac.optim.step.states.optimizer_state import OptimizerState

JOINED = (
    "{} were frozen when the optimizer was made without `params`; it trains them from now on. "
    "For a group of their own, call `add_param_group` between unfreezing and the next `step`; "
    "to leave them to another optimizer, pass `params`."
)


class CurvatureOptimizer(Optimizer):
    """An optimizer with running curvature; its subclass makes the parts and takes the steps."""

    _model: nn.Module
    _names: dict[nn.Parameter, str]
    _settings: Hyperparameters
    _fallback: Fallback
    _preconditioner: RunningCurvature
    _state: OptimizerState
    _report: Report
    _earlier: Report = Report()
    _runner: StepRunner
    _is_covering: bool
    _takes_unfrozen: bool = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its parameters must be the model's, new layers' among them."""
        if isinstance(param_group, dict) and "params" not in param_group:
            found = sorted(map(repr, param_group))
            raise ValueError(f"`param_group` must have the entry 'params', got {found}.")
        if self._is_covering:
            self._accept_assigned_(named_parameters(self._model))
        super().add_param_group(param_group)
        try:
            self._settings.with_overrides(self.param_groups[-1])
            check_member(self.param_groups[-1]["params"], self._model, self._names)
        except ValueError:
            self.param_groups.pop()
            raise
        if self._is_covering:
            self._preconditioner.cover_(self._own_names())
            if self._preconditioner.recorder.is_empty:
                self._preconditioner.begin_()  # the coming step collects for new layers as well

    def coverage(self) -> Training:
        """Return how each parameter is trained; it prints as a table.

        By ``"kfac"`` or the fallback, or it is ``"frozen"``, or ``"left out"`` of ``params``. Its
        ``losses``, which are printed below, say what the losses so far were taken as.
        """
        self._accept_assigned_(named_parameters(self._model))
        own = {p for group in self.param_groups for p in group["params"]}
        covered, losses = (
            self._preconditioner.covered(),
            self._preconditioner.recorder.account.lines,
        )
        return training(self._model, own, covered, self._fallback.kind, losses)

    def statistics(self) -> dict[str, float]:
        """Return numbers of the last step, for a progress bar or a log.

        ``damping``; with fixed rates ``clip``; otherwise ``step_size``, ``momentum`` (its
        coefficient), ``trust`` (fraction of a batch's slope that other batches confirm), ``gain``
        (of the slow momentum, a mean over layers), ``predicted`` (change of the objective by the
        quadratic model), ``ratio`` (true by predicted change, where last compared), or
        ``rejected`` where the step before was undone, since the loss exploded or the model was
        not finite. ``cholesky_retries`` counts decompositions that were repeated so far.
        """
        self._settle_()
        return self._report.numbers(self._preconditioner.layers)

    def layer_statistics(self) -> dict[str, dict[str, float]]:
        """Return numbers of the last step for each layer that has factors, by its name.

        ``damping`` of its inverse; ``condition_a`` and ``condition_b``, condition numbers of its
        factors when they were inverted (damped and in the 1-norm with ``inverse="factored"``,
        else undamped and in the 2-norm); the Euclidean norms ``gradient_norm`` (weight decay
        included), ``update_norm`` and ``parameter_norm``; ``gain`` or ``clip``;
        ``cholesky_retries``; ``factor_seconds`` and ``inverse_seconds``, the host's time for its
        last update and inverse. They are computed in this call; steps do not wait for them.
        """
        self._settle_()
        present = {name: parameter.detach() for parameter, name in self._names.items()}
        return self._report.by_layer(self._preconditioner.layers, present)

    def discard(self) -> None:
        """Drop the batches since the last step, as if they had not been seen.

        For a step that is left out on purpose; call it with ``zero_grad``.
        """
        self._settle_()
        self._preconditioner.discard_()

    def can_replay(self) -> bool:
        """Return whether the coming step neither updates nor inverts factors.

        With ``capturable=True`` such a step may be captured in a CUDA graph, or replayed.
        """
        return self._settings.capturable and self._preconditioner.is_ordinary

    def replay(self, graph: Any) -> bool:
        """Replay a captured step in place of the coming one, and count it, if it `can_replay`.

        The inverses that the graph uses are always the present ones. A graph is to be captured
        anew after `load_state_dict`, and after changes of the model or of numbers in groups; a
        learning rate that is a tensor may change in place.

        Args:
            graph: What captured forward pass, backward pass and `step`: a ``torch.cuda.CUDAGraph``,
                or any object with a method ``replay``.

        Returns:
            Whether it was replayed. If not, the step is to be taken as usual.

        >>> from einconv_kfac import KFAC
        >>> model, loss_fn = nn.Linear(4, 2), nn.MSELoss()
        >>> opt = KFAC(model, loss_fn, lr=0.1, adaptive=False, capturable=True)
        >>> opt.replay(None)  # the first step updates and inverts factors
        False
        """
        if not self.can_replay():
            return False
        graph.replay()
        self._preconditioner.finish_()
        return True

    def state_dict(self, *, include_factors: bool = True) -> dict[str, Any]:
        """Return everything that continuing needs; it loads with ``weights_only=True``.

        Hooks on saving and loading see all of it. The contents of the entry ``"kfac"`` are also
        in the state of the first parameter, as a tuple, since
        `torch.distributed.checkpoint.state_dict` drops what is neither a state of a parameter
        nor a group; ``torch.save`` writes shared tensors once. With several workers, each has the
        whole state, and it may be loaded by any number of them.

        Args:
            include_factors: Whether the factors and their inverses, the largest part, are saved.
                If not, they start anew where the state is loaded.
        """
        self._settle_()
        with self._state.saving(self, flag("include_factors", include_factors)):
            return super().state_dict()

    @without_gradients
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer of the same model and mode.

        Raises:
            ValueError: If an entry is missing, or is not what it must be for this model, mode and
                version. Nothing is changed then.
            RuntimeError: If a parameter was replaced since the optimizer was made.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"`state_dict` must be a dictionary, got {shown(state_dict)}.")
        self._settle_()
        self._preconditioner.stored.divide_()
        present = named_parameters(self._model)
        self._accept_assigned_(present)
        self._take_unfrozen_(present)
        with self._state.loading(self):
            super().load_state_dict(state_dict)

    def __repr__(self) -> str:
        return description(type(self).__name__, self._model, self._settings, self.param_groups)

    def _settle_(self) -> bool:
        """Check the last step if that is still to be done; return ``False`` if it was skipped."""
        late = self._runner.late
        if late.is_settled or late.settle_():
            return True
        self._report = self._earlier
        return False

    def _accept_assigned_(self, present: Mapping[str, nn.Parameter]) -> None:
        """Train parameters that were assigned in place of others, with the state of the others.

        Args:
            present: The model's parameters by name.
        """
        for name, new in self._preconditioner.assigned_(present).items():
            old = next(p for p, own in self._names.items() if own == name)
            names = {new if p is old else p: own for p, own in self._names.items()}
            self._names.clear()  # others have this dictionary
            self._names.update(names)
            for group in self.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if old in self.state:
                self.state[new] = self.state.pop(old)

    def _take_unfrozen_(self, present: Mapping[str, nn.Parameter]) -> None:
        """Train parameters that were frozen when the optimizer was made, if it was given none.

        They join the first group, in the order of the model, as if they had never been frozen.

        Args:
            present: The model's parameters by name.
        """
        own = {parameter for group in self.param_groups for parameter in group["params"]}
        unfrozen = [
            name
            for name, parameter in present.items()
            if parameter.requires_grad and parameter not in own and parameter in self._names
        ]
        if not (unfrozen and self._takes_unfrozen):
            return
        first = self.param_groups[0]
        joined = {*first["params"], *(present[name] for name in unfrozen)}
        first["params"] = [parameter for parameter in present.values() if parameter in joined]
        self._preconditioner.cover_(self._own_names())
        warnings.warn(JOINED.format(shown(unfrozen)), UserWarning, stacklevel=5)

    def _own_names(self) -> list[str]:
        """Return the names of the optimizer's parameters."""
        return [self._names[p] for group in self.param_groups for p in group["params"]]
