"""The K-FAC optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from einconv_kfac.curvature.estimation.fisher import Fisher, FisherEstimator
from einconv_kfac.curvature.factors.approximation import Approximation
from einconv_kfac.curvature.layers.exclusion import Exclusion
from einconv_kfac.curvature.losses.loss_call import is_sum
from einconv_kfac.optim.diagnostics import Report
from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.hyperparameters import Clip
from einconv_kfac.optim.inverses.protocol import Inverse
from einconv_kfac.optim.parameters import Training, check_member, training, uncovered
from einconv_kfac.optim.pickling import rebuilt
from einconv_kfac.optim.schedule import Schedule
from einconv_kfac.optim.step.damping.rule import DampingRule
from einconv_kfac.optim.step.fallback import Fallback, FallbackKind, restore_precision_
from einconv_kfac.optim.step.modes import settings_of, step_of
from einconv_kfac.optim.step.runner import StepRunner


class KFAC(Optimizer):
    """Train a model with Kronecker-factored curvature.

    The gradient ``g`` (with ``weight_decay * parameter`` added) is preconditioned layer by
    layer with ``(B + ..)^-1 g (A + ..)^-1`` (Martens and Grosse, 2015; Grosse and Martens,
    2016, for convolutions). With ``adaptive=True`` the update is ``lr * (alpha d + c m)`` for
    the preconditioned descent direction ``d`` and a slow momentum ``m``. Here ``alpha``
    minimises the exact quadratic model of the objective on the batch, with Levenberg-Marquardt
    damping, and its slope along ``d`` is multiplied by the fraction that later batches confirm;
    ``m`` sums the rest of the steps over a memory that grows with time. With ``adaptive=False``
    the update is heavy-ball momentum with the given ``lr``, ``momentum`` and ``damping``.

    The training loop is torch's own; hooks on the model and on ``loss_fn`` record the batches.
    Every number from ``momentum`` on may be a function of the number of steps taken.

    Args:
        model: The model. Layers that a rule of `einconv_kfac.curvature` covers are
            preconditioned; parameters of others take the ``fallback`` (see `coverage`).
        loss_fn: The loss module that the training loop calls. Without it, the loss is what the
            model returns as ``loss``, or what the loop passes to `observe`.
        lr: Scale of the update, 1 by default; required if not ``adaptive``.
        params: Parameters or parameter groups; all that the model trains by default. A group
            may set ``lr``, ``weight_decay``, ``momentum``, ``damping`` (of its layers' inverses),
            ``factor_decay`` and the two periods, as numbers.
        adaptive: Whether step size, momentum and damping are automatic. ``curvature_fraction`` and
            ``safeguard`` need ``adaptive=True``; ``kl_clip``, ``max_step_norm``, ``nesterov`` and
            ``decoupled_weight_decay`` need ``adaptive=False``.
        momentum: Coefficient of the previous update; by default 0.9, or the slow momentum.
        damping: Multiple of the identity added to the curvature, in its units; by default 0.03
            if not ``adaptive``, otherwise set by the Levenberg-Marquardt rule. Another rule
            (`einconv_kfac.optim.DampingRule`) may be given if ``adaptive``.
        weight_decay: Coefficient of half the squared norm of the parameters in the objective.
        fisher: ``"mc"``, ``"exact"``, ``"empirical"`` or ``"forward-only"``.
        mc_samples: Samples per example for ``fisher="mc"``.
        approximation: ``"expand"`` (KFC) or ``"reduce"``.
        max_factor_size: Largest number of rows of a factor; of larger ones, the diagonal is used.
        factor_decay: Decay of the bias-corrected exponential moving averages of the factors.
        factor_update_period: Steps between two updates of the factors. Early in training this
            and the next period are capped at a tenth of the steps taken.
        inverse_update_period: Steps between two inversions of the factors.
        inverse: ``"factored"`` splits the damping between the factors by trace balance (Martens
            and Grosse, 2015), for Cholesky decompositions; ``"exact"`` adds it to their Kronecker
            product, by eigendecompositions, so that the damping of every step is used at once;
            ``"ekfac"`` also replaces the eigenvalues by moving averages of squared gradients of
            single examples (George et al., 2018). docs/inverses.md compares their costs.
        inverse_in_background: Whether a thread inverts, from the second inversion on. The step
            a tenth of the period later uses the inverse, and waits for the thread.
        factor_fraction: Fraction of each batch's examples, drawn at random, for the factors.
        curvature_fraction: Fraction of each batch's examples, drawn at random, from which the
            quadratic model takes its curvature, for models whose layers treat every example alone.
        kl_clip: Bound on ``lr^2 d.g`` (kfac-jax: norm constraint), 1e-3 by default.
        max_step_norm: Bound on the Euclidean norm of ``lr d``, before momentum; none by default.
        nesterov: Whether momentum is Nesterov's, as in ``torch.optim.SGD``.
        decoupled_weight_decay: Whether weight decay shrinks the parameters by ``lr`` times
            itself and leaves gradient and curvature alone (Loshchilov and Hutter, 2019).
        safeguard: Whether to evaluate the objective again after every step instead of every
            fifth: a step after which its own batch's loss has grown is shortened or taken back,
            and the damping grows. Needs a damping that is not given.
        exclude: Modules, names of modules or patterns of names (``"encoder.*"``), with all that
            they contain, that are left to the fallback.
        fallback: Direction of the parameters without factors: ``"gradient"``, the default with
            fixed rates, or ``"adam"`` (Kingma and Ba, 2015), the default if ``adaptive``, without
            momentum and with a coefficient of its own in the quadratic model.
        strict: Whether to refuse parameters that no Kronecker factor covers.
        log_to: Called after each step that was taken, with its number and `statistics`.
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
        loss_fn: nn.Module | None = None,
        lr: float | None = None,
        *,
        params: Iterable[Any] | None = None,
        adaptive: bool = True,
        momentum: Schedule | None = None,
        damping: Schedule | DampingRule | None = None,
        weight_decay: float = 0.0,
        fisher: Fisher = "mc",
        mc_samples: int = 1,
        approximation: Approximation = "expand",
        max_factor_size: int = 8192,
        factor_decay: Schedule = 0.95,
        factor_update_period: Schedule = 10,
        inverse_update_period: Schedule = 100,
        inverse: Inverse = "factored",
        inverse_in_background: bool = False,
        factor_fraction: float = 1.0,
        curvature_fraction: float = 1.0,
        kl_clip: Clip = "auto",
        max_step_norm: Schedule | None = None,
        nesterov: bool = False,
        decoupled_weight_decay: bool = False,
        safeguard: bool = False,
        exclude: Exclusion = (),
        fallback: FallbackKind | None = None,
        strict: bool = False,
        log_to: Callable[[int, dict[str, float]], object] | None = None,
        seed: int = 0,
    ) -> None:
        settings, rule = settings_of(
            lr=lr,
            adaptive=adaptive,
            momentum=momentum,
            damping=damping,
            weight_decay=weight_decay,
            factor_decay=factor_decay,
            factor_update_period=factor_update_period,
            inverse_update_period=inverse_update_period,
            factor_fraction=factor_fraction,
            curvature_fraction=curvature_fraction,
            kl_clip=kl_clip,
            max_step_norm=max_step_norm,
            nesterov=nesterov,
            decoupled_weight_decay=decoupled_weight_decay,
            safeguard=safeguard,
        )
        estimator = FisherEstimator(loss_fn, fisher, mc_samples, approximation, max_factor_size)
        self._fallback = Fallback.of(fallback, adaptive)
        self._curvature = RunningCurvature(
            model,
            estimator,
            settings,
            exclude=exclude,
            inverse=inverse,
            in_background=inverse_in_background,
            seed=seed,
        )
        self._model, self._settings = self._curvature.model, settings
        self._rule, self._strict, self._log_to = rule, strict, log_to
        self._names = {p: name for name, p in self._model.named_parameters()}
        self._initialize(params)
        self._step = step_of(self._curvature, settings, rule, self._fallback)
        own = self._fallback, settings, self._names, is_sum(loss_fn)
        self._runner, self._report = StepRunner(self._curvature, self._step, *own), Report()

    def _initialize(self, params: Iterable[Any] | None) -> None:
        """Make the parameter groups, and cover their layers."""
        self._is_covering = False  # while torch adds the groups one by one
        trained = (p for p in self._model.parameters() if p.requires_grad)
        try:
            super().__init__(trained if params is None else params, self._settings.group_defaults())
            self._is_covering = True
            self._curvature.cover_(self._own_names())
            self._curvature.begin_()
            gaps = [n for n, kind in self.coverage().items() if kind == self._fallback.kind]
            if self._strict and gaps:
                raise ValueError(uncovered(self._model, gaps))
        except Exception:
            self.remove_hooks()
            raise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its parameters must be the model's."""
        super().add_param_group(param_group)
        try:
            self._settings.with_overrides(self.param_groups[-1])
            check_member(self.param_groups[-1]["params"], self._names)
        except ValueError:
            self.param_groups.pop()
            raise
        if self._is_covering:
            self._curvature.cover_(self._own_names())

    def coverage(self) -> Training:
        """Return how each parameter is trained; it prints as a table.

        By ``"kfac"`` or the fallback, or it is ``"frozen"``, or ``"left out"`` of ``params``.
        """
        covered = self._curvature.covered()
        return training(self._model, self._own_names(), covered, self._fallback.kind)

    def statistics(self) -> dict[str, float]:
        """Return numbers of the last step, for a progress bar or a log.

        ``damping``; with fixed rates ``clip``; otherwise ``step_size``, ``momentum`` (its
        coefficient), ``trust`` (fraction of a batch's slope that other batches confirm), ``gain``
        (of the slow momentum, a mean over layers), ``predicted`` (change of the objective by the
        quadratic model), ``ratio`` (true by predicted change, where last compared), or
        ``rejected`` where the step before was undone, since the loss exploded or the model was
        not finite. ``cholesky_retries`` counts decompositions that were repeated so far.
        """
        return self._report.numbers(self._curvature.layers)

    def layer_statistics(self) -> dict[str, dict[str, float]]:
        """Return numbers of the last step for each layer that has factors, by its name.

        ``damping`` of its inverse; ``condition_a`` and ``condition_b``, condition numbers of its
        factors when they were inverted (damped and in the 1-norm with ``inverse="factored"``,
        else undamped and in the 2-norm); the Euclidean norms ``gradient_norm`` (weight decay
        included), ``update_norm`` and ``parameter_norm``; ``gain`` or ``clip``;
        ``cholesky_retries``; ``factor_seconds`` and ``inverse_seconds``, the host's time for its
        last update and inverse. They are computed in this call; steps do not wait for them.
        """
        present = {name: parameter.detach() for parameter, name in self._names.items()}
        return self._report.by_layer(self._curvature.layers, present)

    def remove_hooks(self) -> None:
        """Detach from the model and the loss for good; no step can be taken after it."""
        self._curvature.collector.remove_hooks()

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
        self._curvature.cover_unfrozen_()
        if (found := self._runner.run_(self)) is not None:
            self._report = Report(*found)
            if self._log_to is not None:
                self._log_to(self._curvature.steps - 1, self.statistics())
        return loss

    def observe(self, loss: Tensor) -> Tensor:
        """Return a loss unchanged, and read off its graph how it depends on the model.

        Call it before ``loss.backward()`` where the loss is not computed by ``loss_fn``, or has
        other terms.

        Raises:
            ValueError: If the loss is not one number that depends on the model.
        """
        if loss.numel() != 1:
            raise ValueError(f"`loss` must be one number, got shape {list(loss.shape)}.")
        recorder = self._curvature.recorder
        if torch.is_grad_enabled() and not recorder.observe_(loss) and recorder.enabled:
            raise ValueError(
                "`loss` must depend on what the model returned or on its parameters, got a loss "
                "that does not. Call `observe` of the optimizer whose model it trains."
            )
        return loss

    def _own_names(self) -> list[str]:
        """Return the names of the optimizer's parameters."""
        return [self._names[p] for group in self.param_groups for p in group["params"]]

    def __reduce__(self) -> tuple[Any, ...]:
        """Describe how to copy it, with its model and its loss, by ``pickle`` or ``deepcopy``."""
        given = {
            **self._settings.arguments(),
            **self._curvature.arguments(),
            "damping": self._settings.damping if self._rule is None else self._rule,
            "params": [dict(group) for group in self.param_groups],
            "fallback": self._fallback.kind,
            "strict": self._strict,
            "log_to": self._log_to,
        }
        return rebuilt, (type(self), given, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that continuing needs; it loads with ``weights_only=True``."""
        own = {"mode": self._step.mode, "step": self._step.state_dict()}
        return {**super().state_dict(), "kfac": {**own, "curvature": self._curvature.state_dict()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer of the same model and mode.

        Raises:
            ValueError: If it belongs to another model, mode or version. Nothing is changed then.
        """
        state = state_dict.get("kfac") or {}
        self._curvature.check_state(state.get("curvature") or state)
        if state["mode"] != self._step.mode:
            raise ValueError("`state_dict` must come from an optimizer with the same `adaptive`.")
        super().load_state_dict(own := {k: state_dict[k] for k in ("state", "param_groups")})
        restore_precision_(self, own)
        self._curvature.load_state_dict(state["curvature"])
        self._step.load_state_dict(state["step"], {n: p.detach() for p, n in self._names.items()})
