"""The K-FAC optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from einconv_kfac.curvature.fisher import Fisher, FisherEstimator
from einconv_kfac.curvature.layers import Approximation, Layer, find_layers
from einconv_kfac.optim.automatic import AutomaticStep, Objective
from einconv_kfac.optim.preconditioner import Preconditioner, generator_for
from einconv_kfac.optim.quadratic import Direction, sum_of
from einconv_kfac.optim.recording import Batch, Recorder
from einconv_kfac.optim.settings import GroupSettings, Schedule, Settings

FIXED_MOMENTUM = 0.9
FIXED_DAMPING = 0.03
_STATE_VERSION = 1


class KFAC(Optimizer):
    """Train a model with Kronecker-factored curvature.

    The gradient ``g`` (with ``weight_decay * parameter`` added) is preconditioned layer by
    layer with ``(B + ..)^-1 g (A + ..)^-1`` (Martens and Grosse, 2015; Grosse and Martens,
    2016, for convolutions). With ``adaptive=True`` the update is ``lr * (alpha d + mu d0)``
    for the preconditioned descent direction ``d`` and the previous update ``d0``, where
    ``alpha`` and ``mu`` minimise the exact quadratic model of the objective on the batch, and
    the damping follows the Levenberg-Marquardt rule. With ``adaptive=False`` the update is
    heavy-ball momentum with the given ``lr``, ``momentum`` and ``damping``.

    The training loop is torch's own; hooks on the model and on ``loss_fn`` see what they need.

    Args:
        model: The model, whose linear and convolution layers are preconditioned. Parameters
            of other layers take the gradient itself as their direction, with a coefficient
            of its own in the quadratic model (see `coverage`).
        loss_fn: The loss module that the training loop calls on the model's output.
        lr: Scale of the update. With ``adaptive=False`` it has no default worth having.
        params: Parameters or parameter groups, as for any torch optimizer; all that the model
            trains by default. A group may set ``lr`` and ``weight_decay``.
        adaptive: Whether step size, momentum and damping are automatic.
        momentum: Coefficient of the previous update, or a function of the step; automatic
            (0.9 if not ``adaptive``) by default.
        damping: Multiple of the identity added to the curvature, in its units, or a function
            of the step; automatic (0.03 if not ``adaptive``) by default.
        weight_decay: Coefficient of half the squared norm of the parameters, which is part of
            the objective.
        fisher: ``"mc"``, ``"exact"``, ``"empirical"`` or ``"forward-only"``.
        mc_samples: Samples per example for ``fisher="mc"``.
        approximation: ``"expand"`` (KFC) or ``"reduce"``.
        factor_decay: Decay of the bias-corrected running averages of the factors.
        factor_update_period: Steps between two updates of the factors. This and the next
            period are shorter at first: a tenth of the steps taken.
        inverse_update_period: Steps between two inversions of the factors.
        kl_clip: Bound on ``lr^2 d.g`` for ``adaptive=False``, ``None`` for none.
        strict: Whether to refuse parameters that no Kronecker factor covers.
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
        factor_decay: float = 0.95,
        factor_update_period: int = 10,
        inverse_update_period: int = 100,
        kl_clip: float | None = 1e-3,
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        estimator = FisherEstimator(loss_fn, fisher, mc_samples, approximation)
        self._settings = Settings(
            momentum, damping, factor_decay, factor_update_period, inverse_update_period, kl_clip
        )
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        trained = (p for p in model.parameters() if p.requires_grad)
        super().__init__(
            trained if params is None else params, {"lr": lr, "weight_decay": weight_decay}
        )
        layers = self._own_layers(model)
        self._covered = {name for layer in layers for name in layer.parameters}
        if strict:
            self._refuse_gaps(model)
        generator = generator_for(model, seed)
        self._preconditioner = Preconditioner(layers, estimator, self._settings, generator)
        self._recorder = Recorder(model, loss_fn, self._preconditioner.gather)
        self._automatic = AutomaticStep(self._recorder) if adaptive else None
        self._step = 0
        self._preconditioner.prepare(0)

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

    def coverage(self) -> dict[str, str]:
        """Return how each parameter of the optimizer is trained: ``"kfac"`` or ``"gradient"``."""
        names = (self._names[p] for group in self.param_groups for p in group["params"])
        return {name: "kfac" if name in self._covered else "gradient" for name in names}

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
        objective = self._objective(self._recorder.take())
        if self._is_finite(objective):
            self._update_(objective)
            self._step += 1
        else:
            self._preconditioner.discard()
            _warn_skipped("A gradient, loss or Kronecker factor")
        self._preconditioner.prepare(self._step)
        return loss

    def _own_layers(self, model: nn.Module) -> list[Layer]:
        """Return the layers whose weight is among the optimizer's parameters."""
        own = {self._names[p] for group in self.param_groups for p in group["params"]}
        return [layer for layer in find_layers(model) if layer.weight in own]

    def _refuse_gaps(self, model: nn.Module) -> None:
        """Raise if a parameter is not covered by Kronecker factors."""
        gaps = [name for name, rule in self.coverage().items() if rule != "kfac"]
        if gaps:
            modules = dict(model.named_modules())
            kinds = {n: type(modules[n.rpartition(".")[0]]).__name__ for n in gaps}
            listed = ", ".join(f"'{name}' ({kind})" for name, kind in kinds.items())
            raise ValueError(
                f"`strict`=True needs Kronecker factors for every parameter, got none for {listed}."
                " Pass strict=False to train these by their gradient, or leave them out of `params`."
            )

    def _objective(self, batches: list[Batch]) -> Objective:
        """Return the objective of this step, from the gradients there are."""
        parameters: Direction = {}
        decay: dict[str, float] = {}
        for group in self.param_groups:
            settings = GroupSettings.of(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    name = self._names[parameter]
                    parameters[name] = parameter
                    decay[name] = settings.weight_decay
        gradient = {
            n: p.grad.add(p, alpha=decay[n]) for n, p in parameters.items() if p.grad is not None
        }
        return Objective(batches, parameters, gradient, decay)

    def _is_finite(self, objective: Objective) -> bool:
        """Tell whether gradients, losses and gathered factors are finite."""
        losses = [batch.loss for batch in objective.batches]
        tensors = [*objective.gradient.values(), *losses, *self._preconditioner.gathered()]
        return not tensors or bool(torch.stack([t.isfinite().all() for t in tensors]).all())

    def _update_(self, objective: Objective) -> None:
        """Take a step."""
        if not objective.parameters:
            return
        if self._automatic is not None and not objective.batches:
            raise RuntimeError(
                "`step` needs the loss it steps on, but none was backpropagated since the last "
                "step that `loss_fn` computed. Compute the loss as `loss_fn(model(x), y)` with "
                "the module given to KFAC, or pass adaptive=False."
            )
        self._preconditioner.update_(self._step)
        if self._automatic is None:
            self._fixed_update_(objective)
        else:
            self._automatic_update_(self._automatic, objective)

    def _direction(self, objective: Objective, damping: float) -> Direction:
        """Return the preconditioned gradient of the covered parameters."""
        weights = self._preconditioner.weights()
        dampings = {layer: damping + objective.decay.get(w, 0.0) for layer, w in weights.items()}
        self._preconditioner.invert_(self._step, dampings)
        return self._preconditioner.apply(objective.gradient)

    def _fixed_update_(self, objective: Objective) -> None:
        """Heavy-ball momentum on the preconditioned gradient, clipped."""
        damping = self._settings.damping_at(self._step)
        momentum = self._settings.momentum_at(self._step)
        gradient, rates = objective.gradient, self._rates()
        direction = self._direction(objective, FIXED_DAMPING if damping is None else damping)
        clip = self._clip(direction, gradient, rates)
        for name, parameter in objective.parameters.items():
            step = direction[name] * clip if name in direction else gradient[name]
            velocity = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(step))
            velocity.mul_(FIXED_MOMENTUM if momentum is None else momentum).add_(step)
            parameter.sub_(velocity, alpha=rates[name])

    def _clip(self, direction: Direction, gradient: Direction, rates: dict[str, float]) -> Tensor:
        """Return the factor that keeps ``sum lr^2 d.g`` at most at ``kl_clip``, at most 1."""
        if self._settings.kl_clip is None or not direction:
            return torch.ones(())
        size = sum_of([rates[n] ** 2 * (d * gradient[n]).sum() for n, d in direction.items()])
        smallest = torch.finfo(size.dtype).tiny
        return (self._settings.kl_clip / size.clamp_min(smallest)).sqrt().clamp_max(1.0)

    def _automatic_update_(self, automatic: AutomaticStep, objective: Objective) -> None:
        """Minimise the quadratic model over the span of the directions."""
        damping = self._settings.damping_at(self._step)
        damping = automatic.damping(objective) if damping is None else damping
        directions = self._directions(objective, damping)
        previous = self._previous(objective)
        if previous:
            directions.append(previous)
        model = objective.model(self._recorder, directions)
        coefficients = automatic.coefficients(
            model,
            damping,
            self._settings.momentum_at(self._step),
            len(directions) - 1 if previous else None,
        )
        if not bool(coefficients.isfinite().all()):
            automatic.grow_()
            _warn_skipped("The quadratic model")
            return
        rate = max(self._rates().values())
        before = sum_of([b.weight * b.loss for b in objective.batches]).double()
        before = before + objective.decay_value()
        self._move_(objective, directions, coefficients * rate)
        automatic.adapt_(self._step, objective, before, model.change(coefficients * rate, damping))

    def _directions(self, objective: Objective, damping: float) -> list[Direction]:
        """Return descent directions: of the covered parameters, and of the others."""
        rates = self._rates()
        rate = max(rates.values()) or 1.0
        covered = self._direction(objective, damping)
        others = {n: g for n, g in objective.gradient.items() if n not in covered}
        return [
            {name: tensor * (-rates[name] / rate) for name, tensor in direction.items()}
            for direction in (covered, others)
            if direction
        ]

    def _previous(self, objective: Objective) -> Direction:
        """Return the previous update."""
        return {
            name: self.state[parameter]["momentum_buffer"]
            for name, parameter in objective.parameters.items()
            if "momentum_buffer" in self.state[parameter]
        }

    def _move_(
        self, objective: Objective, directions: list[Direction], coefficients: Tensor
    ) -> None:
        """Add the combination of directions to the parameters, and remember it."""
        for name, parameter in objective.parameters.items():
            parts = [
                c * d[name] for c, d in zip(coefficients.to(parameter), directions) if name in d
            ]
            update = sum_of(parts)
            self.state[parameter]["momentum_buffer"] = update
            parameter.add_(update)

    def _rates(self) -> dict[str, float]:
        """Return the learning rate by parameter name."""
        return {
            self._names[parameter]: float(group["lr"])
            for group in self.param_groups
            for parameter in group["params"]
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything that continuing needs; it loads with ``weights_only=True``."""
        automatic = None if self._automatic is None else self._automatic.state_dict()
        return {
            **super().state_dict(),
            "kfac": {
                "version": _STATE_VERSION,
                "step": self._step,
                "preconditioner": self._preconditioner.state_dict(),
                "automatic": automatic,
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
        if (state["automatic"] is None) != (self._automatic is None):
            raise ValueError("`state_dict` must come from an optimizer with the same `adaptive`.")
        self._preconditioner.check_state(state["preconditioner"])
        super().load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        self._step = state["step"]
        self._preconditioner.load_state_dict(state["preconditioner"])
        if self._automatic is not None:
            self._automatic.load_state_dict(state["automatic"])
        self._preconditioner.prepare(self._step)


def _warn_skipped(what: str) -> None:
    """Warn the caller of `KFAC.step` that it changed no parameter."""
    warnings.warn(f"{what} was not finite; the step was skipped.", RuntimeWarning, stacklevel=6)
