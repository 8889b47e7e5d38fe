"""A model's running Kronecker factors: gathered in backward passes, applied to gradients."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.estimation.estimate import uncompiled
from einconv_kfac.curvature.estimation.fisher import Fisher, FisherEstimator
from einconv_kfac.curvature.layers.layer import Approximation, find_layers
from einconv_kfac.optim.factors.collector import NEVER_SEEN, Gathering
from einconv_kfac.optim.factors.refresh import Inverses, Renewal
from einconv_kfac.optim.factors.running import RunningFactors, check_layers
from einconv_kfac.optim.hyperparameters import (
    Constants,
    GroupSettings,
    Schedule,
    Settings,
    interval,
    is_due,
)
from einconv_kfac.optim.inverses.protocol import Inverse
from einconv_kfac.optim.inverses.registry import kind_of
from einconv_kfac.optim.parameters import Exclusion, excluded_modules
from einconv_kfac.optim.pickling import arguments, rebuilt
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.vectors import Direction

DEFAULT_DAMPING = 0.03
NOT_FINITE = "A gradient, loss or Kronecker factor was not finite; the step was skipped."


class KFACPreconditioner:
    """Multiplies gradients by an inverse Kronecker-factored curvature, for any optimizer.

    Call `step` between ``loss.backward()`` and the optimizer's ``step()``. It replaces the
    gradient ``g`` of each linear and convolution layer by ``(B + ..)^-1 g (A + ..)^-1`` with
    factored damping (Martens and Grosse, 2015; Grosse and Martens, 2016, for convolutions).
    Other gradients stay. Arguments are those of `KFAC`.

    Args:
        model: The model.
        loss_fn: The loss module that the training loop calls.
        damping: Multiple of the identity added to the curvature, or a function of the step.
        parameters: Names of the parameters to cover, all by default.
        exclude: Modules, names of modules or patterns of names that are left out.
        fisher: Which Fisher.
        mc_samples: Samples per example for ``fisher="mc"``.
        approximation: How positions are treated.
        factor_decay: Decay of the running averages of the factors.
        factor_update_period: Steps between two updates of the factors.
        inverse_update_period: Steps between two inversions.
        inverse: How the damped curvature is inverted.
        inverse_in_background: Whether a thread inverts.
        factor_fraction: Fraction of each batch's examples that the factors are averaged over.
        seed: Seed of the generator for sampled targets.

    Raises:
        ValueError: If a hyper-parameter is out of range or the loss is not known.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> loss_fn = nn.CrossEntropyLoss()
    >>> preconditioner = KFACPreconditioner(model, loss_fn)
    >>> adamw = torch.optim.AdamW(model.parameters())
    >>> loss_fn(model(torch.eye(4)), torch.tensor([0, 1, 0, 1])).backward()
    >>> preconditioner.step()
    >>> adamw.step()
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module,
        *,
        damping: Schedule | None = DEFAULT_DAMPING,
        parameters: Collection[str] | None = None,
        exclude: Exclusion = (),
        fisher: Fisher = "mc",
        mc_samples: int = 1,
        approximation: Approximation = "expand",
        factor_decay: Schedule = 0.95,
        factor_update_period: Schedule = 10,
        inverse_update_period: Schedule = 100,
        inverse: Inverse = "factored",
        inverse_in_background: bool = False,
        factor_fraction: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._given = arguments(locals())
        self._settings = Settings(
            damping, factor_decay, factor_update_period, inverse_update_period
        )
        self._estimator = FisherEstimator(loss_fn, fisher, mc_samples, approximation)
        self._excluded = excluded_modules(uncompiled(model), exclude)
        self._model = uncompiled(model)
        self._running: dict[str, RunningFactors] = {}
        self._inverse = inverse
        self._renewal = Renewal(self._running, kind_of(inverse, fisher), inverse_in_background)
        self._trained: list[bool] = []
        self._parameters = parameters
        self.overrides: Mapping[str, GroupSettings] = {}
        self._gathering = Gathering(model, self._estimator, seed, factor_fraction)
        self.recorder = self._gathering.recorder
        self.replay = self._gathering.replay
        self.cover_(parameters)
        self._steps = 0
        self._begin()

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return self._steps

    def covered(self) -> set[str]:
        """Return the names of the parameters that factors cover."""
        return {name for r in self._running.values() for name in r.layer.parameters}

    @property
    def layers(self) -> Mapping[str, RunningFactors]:
        """The layers that factors cover, by name."""
        return self._running

    def without_factors(self, gradient: Direction) -> Direction:
        """Return the gradients that the coming step will not precondition."""
        layers = [
            running.layer
            for name, running in self._running.items()
            if running.factors is not None or name in self._gathering.moments
        ]
        covered = {n for own in layers if own.weight in gradient for n in own.parameters}
        return {name: tensor for name, tensor in gradient.items() if name not in covered}

    def cover_(self, parameters: Collection[str] | None) -> None:
        """Cover the layers of these parameters (all if ``None``) that are trained by now.

        The factors of a layer start anew where one of its parameters was not trained before.
        """
        self._parameters = parameters
        self._trained = [p.requires_grad for p in self._model.parameters()]
        for layer in find_layers(self._model):
            known = self._running.get(layer.name)
            if parameters is not None and layer.weight not in parameters:
                continue
            if known is not None and set(layer.parameters) <= set(known.layer.parameters):
                continue
            if self._excluded.isdisjoint(layer.modules):
                self._running[layer.name] = RunningFactors(layer)
                self._gathering.watch(layer)

    def notice_unfrozen_(self) -> None:
        """Cover what was unfrozen since the last step."""
        if self._trained != [p.requires_grad for p in self._model.parameters()]:
            self.cover_(self._parameters)

    @torch.no_grad()
    def step(self) -> None:
        """Replace the gradients of the covered parameters by preconditioned ones.

        Raises:
            RuntimeError: If ``loss_fn`` never saw a batch, or a damped factor cannot be
                inverted. No gradient is changed then.
        """
        self.notice_unfrozen_()
        covered = self.covered()
        named = {n: p for n, p in self._model.named_parameters() if n in covered}
        gradient = {n: p.grad for n, p in named.items() if p.grad is not None}
        batches = self.recorder.take()
        if self.is_finite([*gradient.values()], batches):
            self._gathering.check(batches)
            constants = self._settings.at(self._steps)
            damping = constants.damping or DEFAULT_DAMPING
            self.update_(constants)
            self.refresh_(damping, {})
            for name, tensor in self.precondition(gradient).items():
                gradient[name].copy_(tensor)
            self.finish()
        else:
            self.discard()
            warnings.warn(NOT_FINITE, RuntimeWarning, stacklevel=3)

    def check_gathered(self, batches: Sequence[Batch]) -> None:
        """Raise a ``RuntimeError`` if a layer was trained whose factors are due and not seen."""
        self._gathering.check(batches)

    def is_finite(
        self,
        gradients: Sequence[Tensor],
        batches: Sequence[Batch],
        known: Sequence[Tensor] | None = None,
    ) -> bool:
        """See `Gathering.is_finite`."""
        return self._gathering.is_finite(gradients, batches, known)

    def discard(self) -> None:
        """Forget what was gathered since the last step, as if it had not been seen."""
        self._gathering.rewind_()
        self._begin()

    def finish(self) -> None:
        """Count a step, and decide whether to gather for the next."""
        self._steps += 1
        self._begin()

    def update_(self, constants: Constants) -> None:
        """Move the running averages by what was gathered.

        Raises:
            RuntimeError: If nothing was ever gathered.
        """
        for name, moments in self._gathering.moments.items():
            a, b = self._estimator.factors(moments)
            scale = self._estimator.scale(moments.examples)
            running = self._running[name]
            factor_decay = self._of(running, constants).factor_decay
            running.update_(a, b.mul_(scale), factor_decay)
            if moments.squares is not None:
                running.correct_(moments.squares.block(scale).values, factor_decay)
            running.factor_step = self._steps
            running.factor_seconds = moments.seconds
        if self._running and all(r.factor_step is None for r in self._running.values()):
            raise RuntimeError(NEVER_SEEN)

    def refresh_(self, damping: float, decay: Mapping[str, float]) -> None:
        """Recompute the inverses where they are due, and set the damping where that is free.

        Args:
            damping: Damping of the inverses.
            decay: Weight decay by parameter name, which adds to the damping.

        Raises:
            RuntimeError: If a damped factor is singular. No inverse is changed then.
        """
        constants = self._settings.at(self._steps)
        intervals = {
            name: interval(self._steps, self._of(running, constants).inverse_update_period)
            for name, running in self._running.items()
        }
        self._renewal.refresh_(self._dampings(damping, decay), intervals, self._steps)

    def inverted(self, dampings: Iterable[float], decay: Mapping[str, float]) -> Iterator[Inverses]:
        """Yield the inverses for several dampings; raises like `refresh_`.

        Args:
            dampings: Dampings, except where a parameter group sets its own; each is asked for
                when its inverses are.
            decay: Weight decay by parameter name, which adds to the damping.
        """
        return self._renewal.inverted(self._dampings(damping, decay) for damping in dampings)

    def use_(self, inverses: Inverses) -> None:
        """Take over inverses."""
        self._renewal.use_(inverses, self._steps)

    def _dampings(self, damping: float, decay: Mapping[str, float]) -> dict[str, float]:
        """Return the dampings by layer."""
        found: dict[str, float] = {}
        for name, running in self._running.items():
            own = self.overrides.get(weight := running.layer.weight)
            given = damping if own is None or own.damping is None else own.damping
            found[name] = given + decay.get(weight, 0.0)
        return found

    def _of(self, running: RunningFactors, constants: Constants) -> Constants:
        """Return the numbers that hold for a layer."""
        return constants.of(self.overrides.get(running.layer.weight))

    def precondition(self, gradient: Direction, inverses: Inverses | None = None) -> Direction:
        """Return the preconditioned gradient of the covered parameters.

        Args:
            gradient: Gradients by parameter name.
            inverses: Inverses to use instead of the present ones.
        """
        result: Direction = {}
        for name, running in self._running.items():
            if inverses is None:
                running.follow_()
            found = running if inverses is None else inverses.get(name)
            if found and found.inverse is not None and running.layer.weight in gradient:
                result.update(running.apply(gradient, found.inverse))
        return {name: tensor for name, tensor in result.items() if name in gradient}

    def relative_change(self, update: Direction, parameters: Direction) -> float:
        """Return by how much an update changes the outputs of layers, summed over the layers.

        Each change is root mean square, relative to that of the layer's output.
        """
        changes = [r.change(update, parameters) for r in self._running.values() if r.factors]
        return float(torch.stack(changes).sum()) if changes else 0.0

    def _begin(self) -> None:
        """Drop what was gathered, and decide whether to gather for the step to come."""
        constants = self._settings.at(self._steps)
        self._gathering.bases = self._renewal.bases()
        self._gathering.begin_(
            name
            for name, running in self._running.items()
            if is_due(
                self._steps, running.factor_step, self._of(running, constants).factor_update_period
            )
        )

    def remove_hooks(self) -> None:
        """Detach from the model and the loss for good."""
        self._gathering.remove_hooks()

    def __reduce__(self) -> tuple[Any, ...]:
        """Describe how to copy it, with its model and its loss, by ``pickle`` or ``deepcopy``."""
        return rebuilt, (type(self), self._given, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that continuing needs; it loads with ``weights_only=True``."""
        return {
            "layers": {name: running.state_dict() for name, running in self._running.items()},
            "generator": self._gathering.generator.get_state(),
            "steps": self._steps,
            "inverse": self._inverse,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ``ValueError`` if a state belongs to other layers, or another ``inverse``."""
        if state["inverse"] != self._inverse:
            raise ValueError(
                f"`state_dict` must come from the same `inverse`, got {state['inverse']!r} for "
                f"{self._inverse!r}."
            )
        check_layers(self._running, state["layers"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a preconditioner of the same model.

        Raises:
            ValueError: If it belongs to other layers or another ``inverse``. Nothing is changed
                then.
        """
        self.notice_unfrozen_()
        self.check_state(state)
        for name, running in self._running.items():
            running.load_state_dict(state["layers"][name])
        self._gathering.generator.set_state(state["generator"].cpu())
        self._steps = state["steps"]
        self._begin()
