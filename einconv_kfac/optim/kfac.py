"""The K-FAC optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from einconv_kfac.curvature.estimation.estimate import uncompiled
from einconv_kfac.curvature.estimation.fisher import Fisher
from einconv_kfac.curvature.layers.layer import Approximation
from einconv_kfac.curvature.losses import check_reduction
from einconv_kfac.optim.coverage import Training, training, uncovered
from einconv_kfac.optim.diagnostics import Report
from einconv_kfac.optim.hyperparameters import (
    GroupSettings,
    Schedule,
    Settings,
    checked_safeguard,
)
from einconv_kfac.optim.inverses.protocol import Inverse
from einconv_kfac.optim.parameters import Exclusion
from einconv_kfac.optim.pickling import arguments, rebuilt, shared_arguments
from einconv_kfac.optim.preconditioner import NOT_FINITE, KFACPreconditioner
from einconv_kfac.optim.replay.batch import with_subsets
from einconv_kfac.optim.replay.subsample import curvature_fraction_of
from einconv_kfac.optim.step.automatic import AutomaticStep
from einconv_kfac.optim.step.fallback import Fallback, check_fallback, with_fallback
from einconv_kfac.optim.step.fixed import FixedOptions, FixedStep
from einconv_kfac.optim.step.objective import (
    Objective,
    Statistics,
    at_parameters,
    following_,
    rescaled,
)
from einconv_kfac.optim.vectors import norms

_STATE_VERSION = 5


class KFAC(Optimizer):
    """Train a model with Kronecker-factored curvature.

    The gradient ``g`` (with ``weight_decay * parameter`` added) is preconditioned layer by
    layer with ``(B + ..)^-1 g (A + ..)^-1`` (Martens and Grosse, 2015; Grosse and Martens,
    2016, for convolutions). With ``adaptive=True`` the update is ``lr * (alpha d + c m)`` for
    the preconditioned descent direction ``d`` and a slow momentum ``m``. Here ``alpha``
    minimises the exact quadratic model of the objective on the batch, and the damping follows
    the Levenberg-Marquardt rule. Of the slope along ``d``, which comes from the same batch,
    only the fraction counts that the batches after it have confirmed so far; ``m`` sums what is
    left of the steps, as far as later batches confirm that, layer by layer, over a memory that
    grows with time, and the weight ``c`` follows from the number of steps. With
    ``adaptive=False`` the update is heavy-ball momentum with the given ``lr``, ``momentum`` and
    ``damping``.

    The training loop is torch's own; hooks on the model and on ``loss_fn`` see what they need.
    Every hyper-parameter from ``momentum`` on that is a number may be a function of the number
    of steps taken.

    Args:
        model: The model. Layers that a rule of `einconv_kfac.curvature` covers are
            preconditioned; parameters of others take the ``fallback`` (see `coverage`).
        loss_fn: The loss module that the training loop calls on the model's output.
        lr: Scale of the update. With ``adaptive=False`` it has no default worth having.
        params: Parameters or parameter groups, as for any torch optimizer; all that the model
            trains by default. A group may set ``lr``, ``weight_decay``, ``momentum``,
            ``damping``, ``factor_decay`` and the two periods, as numbers. A group's ``damping``
            is that of its layers' inverses; the quadratic model keeps its own.
        adaptive: Whether step size, momentum and damping are automatic.
        momentum: Coefficient of the previous update (heavy ball). By default 0.9 if not
            ``adaptive``, otherwise a slow momentum whose memory grows with time.
        damping: Multiple of the identity added to the curvature, in its units; automatic (0.03
            if not ``adaptive``) by default.
        weight_decay: Coefficient of half the squared norm of the parameters, which is part of
            the objective.
        fisher: ``"mc"``, ``"exact"``, ``"empirical"`` or ``"forward-only"``.
        mc_samples: Samples per example for ``fisher="mc"``.
        approximation: ``"expand"`` (KFC) or ``"reduce"``.
        factor_decay: Decay of the bias-corrected running averages of the factors.
        factor_update_period: Steps between two updates of the factors. This and the next
            period are shorter at first: a tenth of the steps taken.
        inverse_update_period: Steps between two inversions of the factors.
        inverse: ``"factored"`` splits the damping between the factors by trace balance (Martens
            and Grosse, 2015), and takes a Cholesky decomposition of each; ``"exact"`` adds it to
            their Kronecker product, by eigendecompositions, so that the damping of every step
            is used at once; ``"ekfac"`` also replaces the eigenvalues by running averages of
            squared gradients of single examples (George et al., 2018), which are projected to
            the new eigenbasis where that changes. Eigendecompositions take 2 to 5 times as long
            as Cholesky's, and squared gradients make an update of the factors twice as long.
        inverse_in_background: Whether a thread inverts, from the second inversion on. An
            inverse is taken over a tenth of its period after the step whose factors it
            inverts, at the earliest in the next step, however long the thread takes.
        factor_fraction: Fraction of each batch's examples, drawn at random, that the factors
            are averaged over (the backward pass for them takes all).
        curvature_fraction: Fraction of each batch's examples, drawn at random, from which the
            quadratic model takes its curvature, for ``adaptive=True`` and models whose layers
            treat every example alone.
        kl_clip: Bound on ``lr^2 d.g`` for ``adaptive=False``, ``None`` for none; kfac-jax calls
            it norm constraint, as it bounds a norm that the curvature defines.
        max_step_norm: Bound on the Euclidean norm of ``lr d`` for ``adaptive=False``, before
            momentum; none by default.
        nesterov: Whether momentum is Nesterov's, as in ``torch.optim.SGD``, for
            ``adaptive=False``.
        decoupled_weight_decay: Whether weight decay shrinks the parameters by ``lr`` times
            itself and leaves gradient and curvature alone (Loshchilov and Hutter, 2019), for
            ``adaptive=False``.
        safeguard: Whether to evaluate the objective again after every step instead of
            some, for one forward pass, where step size and damping are automatic: a step after
            which its own batch's loss has grown is shortened or rejected, and the damping grows.
        exclude: Modules, names of modules or patterns of names (``"encoder.*"``) that are left
            to the fallback, with all that they contain.
        fallback: Direction of the parameters without factors: ``"adam"`` (Kingma and Ba, 2015)
            or ``"gradient"``. With ``adaptive=True`` it is Adam's by default, without momentum
            and with a coefficient of its own in the quadratic model; otherwise it is the
            gradient, since Adam's needs an ``lr`` of its own.
        strict: Whether to refuse parameters that no Kronecker factor covers.
        log_to: Called after each step that was taken with its number, from 0, and
            `statistics`.
        seed: Seed of the generator for sampled targets.

    Raises:
        ValueError: If a hyper-parameter is out of range, the loss is not known, a parameter
            is not the model's, or ``strict`` finds a gap.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> loss_fn = nn.CrossEntropyLoss()
    >>> opt = KFAC(model, loss_fn)
    >>> loss = loss_fn(model(torch.eye(4)), torch.tensor([0, 1, 0, 1]))
    >>> loss.backward()
    >>> opt.step()
    """

    _step_supports_amp_scaling = True  # read by torch.amp.GradScaler

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module,
        lr: float = 1.0,
        *,
        params: Iterable[Any] | None = None,
        adaptive: bool = True,
        momentum: Schedule | None = None,
        damping: Schedule | None = None,
        weight_decay: float = 0.0,
        fisher: Fisher = "mc",
        mc_samples: int = 1,
        approximation: Approximation = "expand",
        factor_decay: Schedule = 0.95,
        factor_update_period: Schedule = 10,
        inverse_update_period: Schedule = 100,
        inverse: Inverse = "factored",
        inverse_in_background: bool = False,
        factor_fraction: float = 1.0,
        curvature_fraction: float = 1.0,
        kl_clip: Schedule | None = 1e-3,
        max_step_norm: Schedule | None = None,
        nesterov: bool = False,
        decoupled_weight_decay: bool = False,
        safeguard: bool = False,
        exclude: Exclusion = (),
        fallback: Fallback | None = None,
        strict: bool = False,
        log_to: Callable[[int, dict[str, float]], object] | None = None,
        seed: int = 0,
    ) -> None:
        self._given = arguments(locals())
        options = FixedOptions(nesterov, decoupled_weight_decay, max_step_norm)
        if adaptive:
            options.check_automatic()
        safeguard = checked_safeguard(safeguard, adaptive, damping)
        self._portion = curvature_fraction_of(curvature_fraction, adaptive), seed
        entry, model = model, uncompiled(model)
        self._settings = Settings(
            damping,
            factor_decay,
            factor_update_period,
            inverse_update_period,
            momentum,
            kl_clip,
            max_step_norm,
        )
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._reduction = check_reduction(loss_fn)
        self._model = model
        default: Fallback = "adam" if adaptive else "gradient"
        self._fallback = check_fallback(default if fallback is None else fallback)
        trained = (p for p in model.parameters() if p.requires_grad)
        defaults = vars(GroupSettings(lr, weight_decay))
        super().__init__(trained if params is None else params, dict(defaults))
        shared = shared_arguments(self._given, KFACPreconditioner)
        own: dict[str, Any] = {**shared, "model": entry, "parameters": self._own_names()}
        self._preconditioner = KFACPreconditioner(**own)
        self._decoupled, self._log_to = decoupled_weight_decay, log_to
        self._step: AutomaticStep | FixedStep = (
            AutomaticStep(self._preconditioner, safeguard)
            if adaptive
            else FixedStep(self._preconditioner, options)
        )
        self._report = Report()
        gaps = [n for n, kind in self.coverage().items() if kind == self._fallback]
        if strict and gaps:
            self.remove_hooks()
            raise ValueError(uncovered(model, gaps))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its parameters must be the model's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            GroupSettings.of(group)
            for parameter in group["params"]:
                if parameter not in self._names:
                    shape = list(parameter.shape)
                    raise ValueError(f"`params` must be parameters of `model`, got one of {shape}.")
        except ValueError:
            self.param_groups.pop()
            raise
        if "_preconditioner" in vars(self):
            self._preconditioner.cover_(self._own_names())

    def coverage(self) -> Training:
        """Return how each parameter of the model is trained; it prints as a table.

        ``"kfac"``, the name of the fallback, ``"frozen"``, or ``"left out"`` if the optimizer
        does not have it.
        """
        covered = self._preconditioner.covered()
        return training(self._model, self._own_names(), covered, self._fallback)

    def statistics(self) -> dict[str, float]:
        """Return what the last step did, for a progress bar or a log.

        ``damping``, and with ``adaptive=True`` ``step_size``, ``momentum`` (the coefficient of
        what the last steps amount to), ``signal`` (the fraction of a batch's slope that other
        batches confirm), ``gain`` (how far the minima of batches are followed altogether, a mean
        over layers), ``predicted`` (the change of the objective that the quadratic model
        predicted) and ``ratio`` (the true by the predicted change, where they were last
        compared), or ``rejected`` where the step before was undone, since the loss exploded or
        the quadratic model was not finite after it; otherwise ``clip``. Of all steps so far,
        ``cholesky_retries`` counts decompositions that were tried again, in float64 and then
        with ten times the damping of that layer.
        """
        numbers = {name: float(value) for name, value in self._report.numbers.items()}
        retries = sum(running.retries for running in self._preconditioner.layers.values())
        return {**numbers, "cholesky_retries": float(retries)}

    def layer_statistics(self) -> dict[str, dict[str, float]]:
        """Return what the last step did with each layer that has factors, by its name.

        ``damping`` of its inverse; ``condition_a`` and ``condition_b``, the condition numbers of
        its factors when they were inverted (damped and in the 1-norm with
        ``inverse="factored"``, else as they are and in the 2-norm); Euclidean norms
        ``gradient_norm`` (weight decay included), ``update_norm`` and ``parameter_norm`` (after
        the step); ``gain`` where there is a slow momentum, ``clip`` with fixed rates;
        ``cholesky_retries``; ``factor_seconds`` and ``inverse_seconds``, what the host spent on
        its factors and its inverse when they were last updated, where layers that are inverted
        together share the time. They are computed when this is called; steps do not wait.
        """
        parameters = {name: parameter.detach() for parameter, name in self._names.items()}
        return self._report.by_layer(self._preconditioner.layers, parameters)

    def remove_hooks(self) -> None:
        """Detach from the model and the loss for good; no step can be taken after it."""
        self._preconditioner.remove_hooks()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters.

        Args:
            closure: Computes and backpropagates the loss, and returns it.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If ``loss_fn`` has not seen what the step needs, or the damped
                factors cannot be inverted. Nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._preconditioner.notice_unfrozen_()
        objective = self._objective()
        gradients = [*objective.gradient.values()]
        known = norms(gradients)
        if getattr(self, "found_inf", None):  # a gradient scaler will lower its scale
            self._preconditioner.discard()
        elif not self._preconditioner.is_finite(gradients, objective.batches, known):
            self._preconditioner.discard()
            warnings.warn(NOT_FINITE, RuntimeWarning, stacklevel=4)
        else:
            if objective.batches or isinstance(self._step, FixedStep):
                self._preconditioner.check_gathered(objective.batches)
            numbers = self._update_(objective)
            sizes = dict(zip(objective.gradient, known))
            self._report = Report(numbers, sizes, self._step.moved, self._step.gains)
            self._preconditioner.finish()
            if self._log_to is not None:
                self._log_to(self._preconditioner.steps - 1, self.statistics())
        return loss

    def _own_names(self) -> list[str]:
        """Return the names of the optimizer's parameters."""
        return [self._names[p] for group in self.param_groups for p in group["params"]]

    def _objective(self) -> Objective:
        """Return the objective of this step, from the gradients there are."""
        scale = getattr(self, "grad_scale", None)  # set by torch.amp.GradScaler for this step
        objective, overrides = at_parameters(self.param_groups, self._names, scale, self._decoupled)
        self._preconditioner.overrides = overrides
        batches = self._preconditioner.recorder.take()
        if hasattr(self, "found_inf"):
            batches = rescaled(batches, scale, self._reduction)
        batches = with_subsets(batches, *self._portion, self._preconditioner.steps)
        return replace(objective, batches=batches)

    def _update_(self, objective: Objective) -> Statistics:
        """Take a step, and return its statistics."""
        if not objective.parameters:
            return {}
        constants = self._settings.at(self._preconditioner.steps)
        adaptive = isinstance(self._step, AutomaticStep)
        if adaptive:
            constants = replace(constants, momentum=objective.momentum(constants.momentum))
        memory = {n: following_(self.state[p], p) for n, p in objective.parameters.items()}
        plain = self._preconditioner.without_factors(objective.gradient)
        objective, moments = with_fallback(objective, self._fallback, plain, memory, adaptive)
        statistics = self._step.take_(objective, memory, constants)
        for name, state in moments.items():
            memory[name].update(state)
        return statistics

    def __reduce__(self) -> tuple[Any, ...]:
        """Describe how to copy it, with its model and its loss, by ``pickle`` or ``deepcopy``."""
        given = {**self._given, "params": [dict(group) for group in self.param_groups]}
        return rebuilt, (type(self), given, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that continuing needs; it loads with ``weights_only=True``."""
        return {
            **super().state_dict(),
            "kfac": {
                "version": _STATE_VERSION,
                "preconditioner": self._preconditioner.state_dict(),
                "automatic": self._step.state_dict(),
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer of the same model and mode.

        Raises:
            ValueError: If it belongs to another model, mode or version. Nothing is changed then.
        """
        state = state_dict.get("kfac")
        if state is None or state["version"] != _STATE_VERSION:
            raise ValueError(f"`state_dict` must be a KFAC state of version {_STATE_VERSION}.")
        if (state["automatic"] is None) != (self._step.state_dict() is None):
            raise ValueError("`state_dict` must come from an optimizer with the same `adaptive`.")
        self._preconditioner.check_state(state["preconditioner"])
        super().load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        self._preconditioner.load_state_dict(state["preconditioner"])
        parameters = {name: parameter.detach() for parameter, name in self._names.items()}
        self._step.load_state_dict(state["automatic"], parameters)
