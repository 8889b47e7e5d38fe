"""A K-FAC preconditioner for any optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.arguments import flag
from einconv_kfac.curvature.estimation.fisher import Fisher, FisherEstimator
from einconv_kfac.curvature.estimation.preservation import without_gradients
from einconv_kfac.curvature.factors.approximation import Approximation
from einconv_kfac.curvature.layers.exclusion import Exclusion
from einconv_kfac.distributed.detection import check_whole
from einconv_kfac.distributed.workers import Same
from einconv_kfac.distributed.wrappers import unwrapped
from einconv_kfac.optim.arguments import check_trainable
from einconv_kfac.optim.factors.comparison import check_alike
from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.finiteness import NOT_FINITE
from einconv_kfac.optim.factors.gradient_scale import unscaled
from einconv_kfac.optim.factors.ownership import Sharing
from einconv_kfac.optim.hyperparameters import DEFAULT_DAMPING, PERIODS, Hyperparameters
from einconv_kfac.optim.inverses.protocol import Inverse
from einconv_kfac.optim.parameters import check_dense, check_names
from einconv_kfac.optim.pickling import rebuilt, temporary_tensors
from einconv_kfac.optim.replay.environment import without_autocast
from einconv_kfac.optim.schedule import Schedule
from einconv_kfac.optim.vectors import Direction, first_not_finite, norms

NOT_APPLIED = (
    "The preconditioned gradient of '{}' was not finite; the gradients were left as they were."
)
NOTHING_COVERED = (
    "KFACPreconditioner covers no parameter of the model, so `step` leaves all gradients as they "
    "are. `einconv_kfac.coverage(model)` has the reasons; "
    "`einconv_kfac.curvature.register_layer` adds a rule."
)


class KFACPreconditioner:
    """Multiplies gradients by an inverse Kronecker-factored curvature, for any optimizer.

    Call `step` between ``loss.backward()`` and the optimizer's ``step()``. It replaces the
    gradient ``g`` of each linear and convolution layer by ``(B + ..)^-1 g (A + ..)^-1`` with
    factored damping (Martens and Grosse, 2015; Grosse and Martens, 2016, for convolutions).
    Other gradients stay. Arguments are those of `KFAC`.

    The curvature is that of the sum of all losses that were backpropagated, with their weights: the
    objective whose gradient ``.grad`` holds. Clip gradients afterwards. With a gradient scaler,
    call ``scaler.unscale_(optimizer)`` before `step`.

    Args:
        model: The model.
        loss_fn: The loss module that the training loop calls, or none, as for `KFAC`.
        damping: Multiple of the identity added to the curvature, or a function of the step.
        parameters: Names of the parameters to cover, all by default.
        exclude: Modules, names of modules or patterns of names that are left out.
        fisher: Which Fisher.
        mc_samples: Samples per example for ``fisher="mc"``.
        approximation: How positions are treated.
        factor_decay: Decay of the exponential moving averages of the factors.
        factor_update_period: Steps between two updates of the factors.
        inverse_update_period: Steps between two inversions.
        inverse: How the damped curvature is inverted.
        inverse_in_background: Whether a thread inverts.
        divide_factors: Whether each layer's factors are on one of several workers only.
        communication_dtype: Data type in which several workers send factors; see `KFAC`.
        factor_fraction: Fraction of each batch's examples that the factors are averaged over.
        max_factor_size: Largest number of rows of a factor; of larger ones, the diagonal is used.
        seed: Seed of sampled targets and examples.

    Raises:
        ValueError: If a hyper-parameter is out of range, the loss is not known, or a name is not
            that of a parameter.
        TypeError: If ``model`` or ``loss_fn`` is no module.
        RuntimeError: If the models or arguments of several workers differ.

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
        loss_fn: nn.Module | None = None,
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
        divide_factors: bool = False,
        communication_dtype: torch.dtype | None = None,
        factor_fraction: float = 1.0,
        max_factor_size: int = 8192,
        seed: int = 0,
    ) -> None:
        check_trainable(model, loss_fn, "KFACPreconditioner")
        check_whole(model, "KFACPreconditioner")
        self._settings = Hyperparameters(
            damping=damping,
            factor_decay=factor_decay,
            factor_update_period=factor_update_period,
            inverse_update_period=inverse_update_period,
            factor_fraction=factor_fraction,
        )
        self._parameters = check_names(parameters, unwrapped(model))
        self._curvature = RunningCurvature(
            model,
            FisherEstimator(loss_fn, fisher, mc_samples, approximation, max_factor_size),
            self._settings,
            exclude=exclude,
            inverse=inverse,
            in_background=inverse_in_background,
            sharing=Sharing(divide_factors, communication_dtype),
            seed=seed,
            computed=False,  # another optimizer's steps would change norms without bound
        )
        try:
            with self._curvature.workers.together():
                self._curvature.cover_(self._parameters)
                self._curvature.begin_()
                check_alike(self._curvature, self._settings.arguments())
        except BaseException:
            self.remove_hooks()
            raise
        is_whole = parameters is None and isinstance(exclude, tuple) and not exclude
        is_trained = any(parameter.requires_grad for parameter in model.parameters())
        if is_whole and is_trained and not self.covered():
            warnings.warn(NOTHING_COVERED, UserWarning, stacklevel=2)

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return self._curvature.steps

    def covered(self) -> set[str]:
        """Return the names of the parameters that factors cover."""
        return self._curvature.covered()

    @without_gradients
    def step(self) -> None:
        """Replace the gradients of the covered parameters by preconditioned ones.

        Raises:
            RuntimeError: If ``loss_fn`` never saw a batch, a damped factor cannot be inverted,
                or losses have weights of both signs or of a gradient scaler. No gradient is
                changed then.
        """
        workers = self._curvature.workers
        workers.check("KFACPreconditioner")
        with workers.together():
            self._step_()

    def _step_(self) -> None:
        """Replace gradients, or change nothing."""
        curvature = self._curvature
        curvature.cover_unfrozen_()
        covered = curvature.covered()
        named = {n: p for n, p in curvature.model.named_parameters() if n in covered}
        gradient = {n: p.grad for n, p in named.items() if p.grad is not None}
        check_dense(gradient.items())
        restore = curvature.snapshot()
        try:
            self._replace_(gradient)
        except BaseException:
            restore()
            raise

    def _same(self, gradient: Direction, known: Sequence[Tensor]) -> Same:
        """Return what must be the same on all workers."""
        values = {
            **{f"`{name}`": value for name, value in vars(self._curvature.settings.own).items()},
            "covered parameters with a gradient": list(gradient),
            "layers whose factors are due": sorted(self._curvature.collector.due),
            "number of steps": self._curvature.steps,
        }
        return Same(values, {"gradients": known})

    def discard(self) -> None:
        """Drop the batches since the last step, as if they had not been seen."""
        self._curvature.discard_()

    def _replace_(self, gradient: Direction) -> None:
        """Replace gradients, as the last thing that happens."""
        curvature = self._curvature
        curvature.recorder.gradients.check()
        is_due = bool(curvature.collector.due)
        products = curvature.recorder.gradients.products() if is_due else None
        batches, scale = curvature.recorder.take(), 1.0
        losses = [batch.loss for batch in batches]
        known = norms(gradient.values())
        same = partial(self._same, gradient, known)
        if fault := curvature.collector.not_finite(gradient, losses, known, same):
            curvature.discard_()
            warnings.warn(NOT_FINITE.format(fault), RuntimeWarning, stacklevel=5)
            return
        if is_due:
            batches, scale = unscaled(batches, products)
        curvature.collector.combine_(batches, scale)
        curvature.collector.check(batches)
        damping: Any = curvature.settings.own.damping
        with without_autocast(curvature.model):
            curvature.update_()
            curvature.refresh_(damping or DEFAULT_DAMPING, {})
            found = curvature.precondition(gradient)
        if name := first_not_finite(found):
            warnings.warn(NOT_APPLIED.format(name), RuntimeWarning, stacklevel=5)
            found = {}
        curvature.finish_()
        if found:
            torch._foreach_copy_([gradient[name] for name in found], list(found.values()))

    def observe(self, loss: Tensor) -> Tensor:
        """Return a loss unchanged, and read off its graph how it depends on the model.

        See `KFAC.observe`.
        """
        return self._curvature.recorder.observed(loss)

    def remove_hooks(self) -> None:
        """Detach from the model and the loss for good."""
        self._curvature.collector.remove_hooks()

    def __reduce__(self) -> tuple[Any, ...]:
        """Describe how to copy it, with its model and its loss, by ``pickle`` or ``deepcopy``."""
        names = ("damping", "factor_decay", *PERIODS, "factor_fraction")
        given = {name: getattr(self._settings, name) for name in names}
        given |= {**self._curvature.arguments(), "parameters": self._parameters}
        state = self.state_dict()
        self._sent = temporary_tensors(state)  # kept, see there
        return rebuilt, (type(self), given, state)

    def state_dict(self, *, include_factors: bool = True) -> dict[str, Any]:
        """Return everything that continuing needs; it loads with ``weights_only=True``.

        Args:
            include_factors: See `KFAC.state_dict`.
        """
        return self._curvature.state_dict(flag("include_factors", include_factors))

    @without_gradients
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a preconditioner of the same model.

        Raises:
            ValueError: If an entry is missing, or is not what it must be for this model and
                ``inverse``. Nothing is changed then.
            RuntimeError: If a parameter was replaced since the preconditioner was made.
        """
        restore = self._curvature.snapshot()
        self._curvature.cover_unfrozen_()
        self._curvature.check_state(state)
        try:
            self._curvature.load_state_dict(state)
        except BaseException:
            restore()
            raise
