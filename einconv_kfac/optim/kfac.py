"""The K-FAC optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.arguments import callback, flag
from einconv_kfac.curvature.devices.stream_capture import is_capturing
from einconv_kfac.curvature.estimation.fisher import Fisher, FisherEstimator
from einconv_kfac.curvature.estimation.preservation import without_gradients
from einconv_kfac.curvature.factors.approximation import Approximation
from einconv_kfac.curvature.layers.exclusion import Exclusion
from einconv_kfac.curvature.losses.loss_call import is_sum
from einconv_kfac.optim.arguments import check_trainable
from einconv_kfac.optim.curvature_optimizer import CurvatureOptimizer
from einconv_kfac.optim.diagnostics import Report
from einconv_kfac.optim.factors.comparison import check_alike
from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.ownership import Sharing
from einconv_kfac.optim.hyperparameters import Clip
from einconv_kfac.optim.inverses.protocol import Inverse
from einconv_kfac.optim.parameters import check_gaps, parameters_of
from einconv_kfac.optim.pickling import rebuilt, temporary_tensors
from einconv_kfac.optim.schedule import Schedule
from einconv_kfac.optim.step.capturable import check_capture
from einconv_kfac.optim.step.damping.rule import DampingRule
from einconv_kfac.optim.step.fallback import Fallback, FallbackKind
from einconv_kfac.optim.step.modes import check_settings, group_defaults, settings_of, step_of
from einconv_kfac.optim.step.runner import StepRunner
from einconv_kfac.optim.step.states.optimizer_state import OptimizerState


class KFAC(CurvatureOptimizer):
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
        model: The model, or what torch wrapped around it. Layers that a rule of
            `einconv_kfac.curvature` covers are preconditioned; parameters of others take the
            ``fallback`` (see `coverage`).
        loss_fn: The loss module that the training loop calls. Without it, losses are numbers that
            the model returns, or what the loop passes to `observe`.
        lr: Scale of the update, 1 by default; required if not ``adaptive``.
        params: Parameters or parameter groups; by default all that the model trains, now or once
            they are unfrozen. A group may set ``lr``, ``weight_decay``, ``momentum``, ``damping``
            (of its layers' inverses), ``factor_decay`` and the two periods, as numbers.
        adaptive: Whether step size, momentum and damping are automatic. ``curvature_fraction`` and
            ``safeguard`` need ``adaptive=True``; ``kl_clip``, ``max_step_norm`` and ``nesterov``
            need ``adaptive=False``.
        momentum: Coefficient of the previous update; by default 0.9, or the slow momentum.
        damping: Multiple of the identity added to the curvature, in its units; by default 0.03, or
            if ``adaptive`` by a `einconv_kfac.optim.DampingRule`, Levenberg and Marquardt's.
        weight_decay: Coefficient of half the squared norm of the parameters in the objective.
        fisher: ``"mc"``, ``"exact"``, ``"empirical"`` or ``"forward-only"``.
        mc_samples: Samples per example for ``fisher="mc"``.
        approximation: ``"expand"`` (KFC) or ``"reduce"``.
        max_factor_size: Largest number of rows of a factor; of larger ones, the diagonal is used.
        factor_decay: Decay of the bias-corrected exponential moving averages of the factors.
        factor_update_period: Steps between two updates of the factors. Early in training this
            and the next period are capped at a tenth of the steps taken.
        inverse_update_period: Steps between two inversions, early ones in docs/inverses.md.
        inverse: ``"factored"`` splits the damping between the factors by trace balance (Martens
            and Grosse, 2015), for Cholesky decompositions; ``"exact"`` adds it to their Kronecker
            product, by eigendecompositions, so that the damping of every step is used at once;
            ``"ekfac"`` also replaces the eigenvalues by moving averages of squared gradients of
            single examples (George et al., 2018). docs/inverses.md compares their costs.
        inverse_in_background: Whether a thread inverts, from the second inversion on. The step
            a tenth of the period later uses the inverse, and waits for the thread.
        divide_factors: Whether each layer's factors are on one of several workers only, which
            inverts them: half of the messages with factors, and a part of their memory. All
            workers must then call `state_dict`, and ``inverse_in_background`` must be ``False``.
        communication_dtype: Data type in which several workers send factors, which are rounded
            twice: ``torch.float16`` (errors below ``2^-10 sqrt(A_ii A_jj)``) or
            ``torch.bfloat16`` (``2^-7``). By default, and for inverses, it is their own.
        factor_fraction: Fraction of each batch's examples, drawn at random, for the factors.
        curvature_fraction: Fraction of each batch's examples, drawn at random, from which the
            quadratic model takes its curvature, for models whose layers treat every example alone.
        kl_clip: Bound on ``lr^2 d.g`` (kfac-jax: norm constraint), 1e-3 by default.
        max_step_norm: Bound on the Euclidean norm of ``lr d``, before momentum; none by default.
        nesterov: Whether momentum is Nesterov's, as in ``torch.optim.SGD``.
        decoupled_weight_decay: Whether weight decay shrinks the parameters by ``lr`` times
            itself in every step and leaves gradient and curvature alone (Loshchilov and Hutter,
            2019). Where ``lr`` is 1, values are smaller than those of AdamW.
        maximize: Whether the loss is maximised, as in torch's optimizers; with ``adaptive=True``
            write ``loss = optimizer.observe(-objective)`` instead.
        safeguard: Whether to evaluate the objective again after every step instead of every
            tenth: a step after which its own batch's loss has grown is shortened or taken back,
            and the damping grows. Needs a damping that is not given.
        capturable: Whether a CUDA graph may capture steps that neither update nor invert factors
            (see `replay`). They make the host wait for nothing, are left out by the device without
            a report where a number is not finite, and take ``lr`` from a tensor if it is one.
            Needs ``adaptive=False``.
        exclude: Modules, names of modules or patterns of names (``"encoder.*"``), with all that
            they contain, that are left to the fallback.
        fallback: Direction of the parameters without factors: ``"gradient"``, the default with
            fixed rates, or ``"adam"`` (Kingma and Ba, 2015), the default if ``adaptive``, without
            momentum and with a coefficient of its own in the quadratic model.
        strict: Whether to refuse parameters that no Kronecker factor covers.
        log_to: Called after each step that was taken, with its number and `statistics`.
        seed: Seed of sampled targets and examples.

    Raises:
        ValueError: If a hyper-parameter is out of range, the loss is not known, a parameter
            is not the model's, or ``strict`` finds a gap.
        TypeError: If ``model`` or ``loss_fn`` is no module.
        RuntimeError: If the models or arguments of several workers differ.

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
        divide_factors: bool = False,
        communication_dtype: torch.dtype | None = None,
        factor_fraction: float = 1.0,
        curvature_fraction: float = 1.0,
        kl_clip: Clip = "auto",
        max_step_norm: Schedule | None = None,
        nesterov: bool = False,
        decoupled_weight_decay: bool = False,
        safeguard: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        exclude: Exclusion = (),
        fallback: FallbackKind | None = None,
        strict: bool = False,
        log_to: Callable[[int, dict[str, float]], object] | None = None,
        seed: int = 0,
    ) -> None:
        check_trainable(model, loss_fn, "KFAC")
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
            maximize=maximize,
            capturable=capturable,
        )
        self._fallback = Fallback.of(fallback, adaptive, settings.capturable)
        check_settings(settings, model, inverse_in_background)
        self._strict, self._log_to = flag("strict", strict), callback("log_to", log_to)
        self._preconditioner = RunningCurvature(
            model,
            FisherEstimator(loss_fn, fisher, mc_samples, approximation, max_factor_size),
            settings,
            exclude=exclude,
            inverse=inverse,
            in_background=inverse_in_background,
            sharing=Sharing(divide_factors, communication_dtype),
            seed=seed,
        )
        self._model, self._settings, self._rule = self._preconditioner.model, settings, rule
        self._names = {p: name for name, p in self._model.named_parameters()}
        self._begin(params, group_defaults(settings, lr))
        self._step = step_of(self._preconditioner, settings, rule, self._fallback)
        own = self._fallback, settings, self._names, is_sum(loss_fn)
        self._runner, self._report = StepRunner(self._preconditioner, self._step, *own), Report()
        self._state = OptimizerState(self._preconditioner, self._step, settings, self._names)

    def _begin(self, params: Iterable[Any] | None, defaults: dict[str, Any]) -> None:
        """Make the parameter groups, and cover their layers."""
        self._is_covering = False  # while torch adds the groups one by one
        curvature = self._preconditioner
        try:
            with curvature.workers.together():
                own = parameters_of(self._model, params)
                super().__init__(own, defaults)
                self._takes_unfrozen = params is None
                self._is_covering = True
                curvature.cover_(self._own_names())
                curvature.begin_()
                check_gaps(self._model, self.coverage(), self._fallback.kind, self._strict)
                others = {"fallback": self._fallback.kind, "params": self._own_names()}
                check_alike(curvature, {**self._settings.arguments(), **others})
                with curvature.stored.gathered(curvature.workers):
                    pass  # which finds the parameters that calls use
        except BaseException:
            self.remove_hooks()
            raise

    def remove_hooks(self) -> None:
        """Detach from the model and the loss for good; no step can be taken after it."""
        self._preconditioner.collector.remove_hooks()

    @without_gradients
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters.

        Args:
            closure: Computes and backpropagates the loss, and returns it.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If ``loss_fn`` has not seen what the step needs, the damped factors
                cannot be inverted, a gradient is sparse, or a parameter was replaced.

        After any error, an interrupt among them, parameters and state are as they were before, and
        the batches since the last step are dropped; an error of ``log_to`` comes after the step.
        """
        if is_captured := is_capturing():
            check_capture(self._settings, self._preconditioner)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = callback("closure", closure)()
        workers = self._preconditioner.workers
        workers.check("KFAC")
        with workers.together():
            self._settle_()
            self._preconditioner.stored.divide_()
            self._preconditioner.recorder.tree.find_()
            present = self._preconditioner.recorder.tree.parameters
            self._accept_assigned_(present)
            if self._preconditioner.cover_unfrozen_(present):
                self._take_unfrozen_(present)
            found = self._runner.run_(self)
        if found is not None and not is_captured:
            self._earlier, self._report = self._report.without_updates(), Report(*found)
            if self._log_to is not None and self._settle_():
                self._log_to(self._preconditioner.steps - 1, self.statistics())
        return loss

    def observe(self, loss: Tensor) -> Tensor:
        """Return a loss unchanged, and read off its graph how it depends on the model.

        Call it before ``loss.backward()`` where the loss is not computed by ``loss_fn``, or has
        other terms.

        Raises:
            ValueError: If the loss is not one number that depends on the model.
        """
        return self._preconditioner.recorder.observed(loss)

    def __reduce__(self) -> tuple[Any, ...]:
        """Describe how to copy it, with its model and its loss, by ``pickle`` or ``deepcopy``."""
        given = {
            **self._settings.arguments(),
            **self._preconditioner.arguments(),
            "damping": self._settings.damping if self._rule is None else self._rule,
            "params": [dict(group) for group in self.param_groups],
            "fallback": self._fallback.kind,
            "strict": self._strict,
            "log_to": self._log_to,
        }
        state = self.state_dict()
        self._sent = temporary_tensors(state)  # kept, see there
        return rebuilt, (type(self), given, state, {"_takes_unfrozen": self._takes_unfrozen})
