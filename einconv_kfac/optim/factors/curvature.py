"""The running curvature of a model: factors and inverses of all layers, applied to gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from einconv_kfac.curvature.arguments import flag, seed_value
from einconv_kfac.curvature.estimation.fisher import FisherEstimator
from einconv_kfac.curvature.layers.discovery import find_layers
from einconv_kfac.curvature.layers.exclusion import Exclusion, excluded_modules
from einconv_kfac.distributed.detection import stored_model, workers_of
from einconv_kfac.distributed.wrappers import unwrapped
from einconv_kfac.optim.factors.averages import Contribution, move_averages_
from einconv_kfac.optim.factors.collector import Collector
from einconv_kfac.optim.factors.curvature_state import (
    CURVATURE_STATE_VERSION,
    check_curvature_state,
    loaded_layers,
)
from einconv_kfac.optim.factors.layer_numbers import LayerNumbers
from einconv_kfac.optim.factors.output_change import OutputChange
from einconv_kfac.optim.factors.ownership import DEFAULT_SHARING, Ownership, Sharing
from einconv_kfac.optim.factors.preconditioning import Preconditioning, scaled_apart
from einconv_kfac.optim.factors.refresh import Inverses, Refresh
from einconv_kfac.optim.factors.running import RunningFactors, names_with_factors, snapshot_of
from einconv_kfac.optim.factors.separate_examples import separates
from einconv_kfac.optim.hyperparameters import GroupSettings, Hyperparameters
from einconv_kfac.optim.inverses.registry import kind_of
from einconv_kfac.optim.model_walk import named_parameters
from einconv_kfac.optim.parameters import assigned_parameters, check_present, owners_of
from einconv_kfac.optim.replay.unknown_operations import NO_LOSS
from einconv_kfac.optim.schedule import due_names
from einconv_kfac.optim.vectors import Direction


class RunningCurvature:
    """Running Kronecker factors of a model's layers, and their damped inverses.

    `update_` moves the factors by what backward passes contributed, `refresh_` computes inverses
    where they are due, `precondition` applies them. `finish_` ends a step, `discard_` drops it.

    Args:
        model: The model, or what torch wrapped around it.
        estimator: Which Fisher of which loss.
        settings: Hyper-parameters.
        exclude: Modules, names of modules or patterns of names that are left out.
        inverse: Name of the kind of inverse.
        in_background: Whether a thread inverts.
        seed: Seed of sampled targets and examples.
        sharing: How several workers share factors.
        computed: Whether weights may be computed from parameters, see `find_layers`.
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: FisherEstimator,
        settings: Hyperparameters,
        *,
        exclude: Exclusion = (),
        inverse: str = "factored",
        in_background: bool = False,
        seed: int = 0,
        sharing: Sharing = DEFAULT_SHARING,
        computed: bool = True,
    ) -> None:
        self.layers: dict[str, RunningFactors] = {}
        self._numbers = LayerNumbers(self.layers, settings)
        self.steps, self.estimator, self._schedules = 0, estimator, settings
        self.model, self._kind = unwrapped(model), kind_of(inverse, estimator.fisher)
        self.seed, self._entry, self._exclude = seed_value(seed), model, exclude
        self._in_background, self._computed = flag("inverse_in_background", in_background), computed
        self._sharing, dtype = sharing, sharing.communication_dtype
        self.workers, self.stored = workers_of(model, dtype), stored_model(model)
        self.stored.divide_()
        self._ownership = Ownership.of(self.workers, sharing.divide_factors, in_background)
        work = self._kind, in_background, self.workers, self._ownership.owners
        self.inversions = Refresh(self.layers, self._numbers, *work)
        self._preconditioning = Preconditioning(self.layers)
        self._change = OutputChange(self.layers)
        self._parameters: Collection[str] | None = None
        self._trained, self._known = list[bool](), dict[str, nn.Parameter]()  # when covered
        self._owners, self._excluded = owners_of(self.model), excluded_modules(self.model, exclude)
        self.apart: frozenset[str] = frozenset()  # parameters with a coefficient of their own
        own = self.seed, settings.factor_fraction, self.workers, self.stored
        self.collector = Collector(model, estimator, *own)
        self.collector.owners = self._ownership.owners
        self.recorder, self.replay = self.collector.recorder, self.collector.replay
        self.recorder.pending.separates_examples = separates(estimator, self._kind, settings)

    def cover_(self, parameters: Collection[str] | None) -> None:
        """Cover the layers of these parameters (all if ``None``) that are trained now.

        The factors of a layer start anew where one of its parameters was not trained before.
        """
        self._parameters = parameters
        present = named_parameters(self.model)
        self._trained = [p.requires_grad for p in present.values()]
        self.apart = scaled_apart(found := find_layers(self.model, computed=self._computed))
        for layer in found:
            known = self.layers.get(layer.name)
            if parameters is not None and layer.weight not in parameters:
                continue
            if known is not None and set(layer.parameters) <= set(known.layer.parameters):
                continue
            if self._excluded.isdisjoint(layer.modules):
                self.layers[layer.name] = RunningFactors(layer, self.estimator)
                self.collector.watch(layer)
        for name in [own.name for own in found if own.name in self.layers]:
            self.layers[name] = self.layers.pop(name)  # as in the model
        self._ownership.assign_(self.layers)
        own = self.covered() if parameters is None else parameters
        self._known = {name: present[name] for name in own if name in present} | self._known

    def assigned_(self, present: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return those of the present parameters that replace covered ones, and accept them."""
        found = assigned_parameters(self._known, self._owners, self.model, present)
        self._known |= found
        return found

    def cover_unfrozen_(self, present: Mapping[str, nn.Parameter] | None = None) -> bool:
        """Cover the layers that were unfrozen, given the model's parameters if they are known.

        Returns whether other parameters are trained than before.

        Raises:
            RuntimeError: If a parameter is not the one that was covered.
        """
        present = named_parameters(self.model) if present is None else present
        if any(present.get(name) is not own for name, own in self._known.items()):
            self.assigned_(present)
            check_present(self._known, present)
        if self._trained == [p.requires_grad for p in present.values()]:
            return False
        self.cover_(self._parameters)
        return True

    def covered(self) -> set[str]:
        """Return the names of the parameters that factors cover: layers with a trained weight."""
        layers = [running.layer for running in self.layers.values()]
        present = nn.Module.named_parameters(self.model, remove_duplicate=False)
        trained = {name for name, parameter in present if parameter.requires_grad}
        return {name for own in layers if own.weight in trained for name in own.parameters}

    def without_factors(self, gradient: Direction) -> Direction:
        """Return the gradients that the coming step will not precondition."""
        known = {*names_with_factors(self.layers), *self.collector.moments}
        layers = [self.layers[name].layer for name in known]
        covered = {n for own in layers if own.weight in gradient for n in own.parameters}
        return {name: tensor for name, tensor in gradient.items() if name not in covered}

    @property
    def settings(self) -> GroupSettings:
        """The hyper-parameters of the coming step."""
        return self._numbers.settings

    def set_groups_(self, own: Hyperparameters, groups: Mapping[str, Hyperparameters]) -> None:
        """Set the hyper-parameters of a step: the optimizer's, and those of each parameter."""
        self._numbers.set_(own, groups)

    def begin_(self) -> None:
        """Drop what was collected, and decide which layers the next step collects for."""
        self._change.present = None
        self.inversions.space_()
        self._numbers.set_(self._schedules.at(self.steps), self.settings.by_parameter)
        periods = self._numbers.of("factor_update_period")
        work = {n: (own.factor_step, periods[n]) for n, own in self.layers.items()}
        self.collector.begin_(due_names(self.steps, work), self.inversions.bases(), self.steps)

    def discard_(self) -> None:
        """Forget what was collected since the last step, as if it had not been seen."""
        self.begin_()

    def finish_(self) -> None:
        """Count a step, and begin the next."""
        self.steps += 1
        self.begin_()

    def update_(self) -> None:
        """Move the running averages by what was collected.

        Raises:
            RuntimeError: If nothing was ever collected.
        """
        if moments := self.collector.moments:
            decays, layers = self._numbers.of("factor_decay"), self.layers
            scales = self.collector.weights.scales(moments)
            found = [Contribution(layers[n], m, decays[n], *scales[n]) for n, m in moments.items()]
            move_averages_(found, self.steps)
            self._change.small = None
            self.inversions.space_()
        known = any(own.factor_step is not None for own in self.layers.values())
        if self.layers and not (known or self.collector.has_seen_loss):
            raise RuntimeError(NO_LOSS)

    def refresh_(self, damping: float, decay: Mapping[str, float]) -> None:
        """Recompute the inverses where they are due, and set the damping where that is free.

        Args:
            damping: Damping of the inverses.
            decay: Weight decay by parameter name, which adds to the damping.

        Raises:
            RuntimeError: If a damped factor is singular. No inverse is changed then.
        """
        self.inversions.refresh_(self._numbers.dampings(damping, decay), self.steps)

    def set_damping_(self, damping: float, decay: Mapping[str, float]) -> None:
        """Set the damping where that is free, and recompute no inverse; see `refresh_`."""
        if not self._kind.damping_needs_decomposition:
            self.inversions.set_damping_(self._numbers.dampings(damping, decay))

    def inverts(self, step: int | None = None) -> bool:
        """Return whether a step, by default the coming one, takes inverses that are new."""
        return self.inversions.is_due(self.steps if step is None else step)

    @property
    def is_ordinary(self) -> bool:
        """Whether the coming step neither updates nor inverts factors."""
        return not self.collector.due and not self.inverts()

    def trial_inverses(self, decay: Mapping[str, float]) -> Callable[[float], Inverses]:
        """Return a function that inverts with a damping; it raises like `refresh_`.

        Decompositions are shared where the kind of inverse allows it. For ``decay`` see there.
        """
        trial = self.inversions.trial()
        return lambda damping: trial(self._numbers.dampings(damping, decay))

    def use_(self, inverses: Inverses) -> None:
        """Take over inverses."""
        self.inversions.use_(inverses, self.steps)

    def precondition(self, gradient: Direction, inverses: Inverses | None = None) -> Direction:
        """Return the preconditioned gradient of the covered parameters.

        Args:
            gradient: Gradients by parameter name.
            inverses: Inverses to use instead of the present ones.
        """
        return self._preconditioning.applied(gradient, inverses)

    def relative_change(self, update: Direction, parameters: Direction) -> Tensor:
        """Return the sum over layers of the relative changes of their outputs by an update."""
        return self._ownership.total(self._change.of(update, parameters))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a constructor of what owns this curvature."""
        given = [entry.name for entry in fields(self.estimator) if entry.init and not entry.kw_only]
        return {
            **{name: getattr(self.estimator, name) for name in given},
            "model": self._entry,
            "exclude": self._exclude,
            "inverse": self._kind.name,
            "inverse_in_background": self._in_background,
            **vars(self._sharing),
            "seed": self.seed,
        }

    def snapshot(self) -> Callable[[], None]:
        """Return a function that restores the present state, and drops what was collected."""
        restore_layers, steps = snapshot_of(self.layers), self.steps
        settings, seed = self.settings, self.seed

        def restore() -> None:
            restore_layers()
            self._numbers.restore_(settings)
            self.steps, self.seed, self.collector.seed = steps, seed, seed
            self.begin_()

        return restore

    def state_dict(self, include_factors: bool = True) -> dict[str, Any]:
        """Return everything that continuing needs; it loads with ``weights_only=True``.

        Args:
            include_factors: Whether factors and inverses are part of it; if not, they start anew
                where it is loaded.
        """
        return {
            "version": CURVATURE_STATE_VERSION,
            "layers": self._ownership.states(self.layers) if include_factors else None,
            "steps": self.steps,
            "seed": self.seed,
            "inverse": self._kind.name,
        }

    def check_state(self, state: Any) -> None:
        """Raise a ``ValueError`` if a state is none, or of another version, kind or model."""
        check_curvature_state(state, self.layers, self._kind)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of the curvature of the same model that `check_state` accepts."""
        self.layers.update(loaded_layers(self.layers, state["layers"]))
        self.steps, self.seed, self.collector.seed = state["steps"], state["seed"], state["seed"]
        self.begin_()
