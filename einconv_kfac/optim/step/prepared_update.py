"""The update of an ordinary automatic step, computed before the host has read a number of it.

On a GPU the host would wait for the backward pass in each step, and the GPU for the host
afterwards. An ordinary step follows from numbers of the last fit, and hardly ever from the numbers
that the host reads: whether all are finite, for example. So the device is asked for the update
first. It is dropped in the rare case that these numbers ask for another one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.sending import sent
from einconv_kfac.optim.step.decoupled_decay import decay_
from einconv_kfac.optim.step.fits.carried_fit import CarriedMix
from einconv_kfac.optim.step.fits.fit import Fit
from einconv_kfac.optim.step.fits.slope_trust import SlopeTrust
from einconv_kfac.optim.step.fits.subspace import SubspaceFit
from einconv_kfac.optim.step.in_place import add_
from einconv_kfac.optim.step.momentum.layer_products import LARGEST_JOINED_ENTRIES, on_device
from einconv_kfac.optim.step.momentum.slow_momentum import BUFFER, SlowMomentum
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.reading import sent_rows
from einconv_kfac.optim.step.rollback import MOMENTUM_BUFFER
from einconv_kfac.optim.vectors import Direction, layer_of, multiplied

SMALLEST_COUNT = 4
"""Number of small tensors up to which operations are started for each."""


@dataclass(frozen=True)
class PreparedUpdate:
    """An update that was prepared.

    Args:
        mix: The directions with the coefficients of the last fit.
        update: The step along them and the momentum's part, by parameter name.
        later: The slow momentum after it.
    """

    mix: CarriedMix
    update: Direction
    later: Direction


@dataclass(frozen=True)
class Preparation:
    """Prepares updates.

    Args:
        subspace: Fits the coefficients of directions.
        trust: The trust in slopes.
        slow: The slow momentum.
        safeguard: Whether the objective is evaluated after every step, which is not prepared.
    """

    subspace: SubspaceFit
    trust: SlopeTrust
    slow: SlowMomentum
    safeguard: bool

    def prepared(
        self, objective: Objective, followed: Direction, mix: CarriedMix, sample: Tensor
    ) -> PreparedUpdate | None:
        """Return the update of a step with the coefficients of the last fit.

        Args:
            objective: The objective.
            followed: The slow momentum, times learning rates.
            mix: The directions with these coefficients.
            sample: The sample of the trust, which the host has not read.
        """
        rates = objective.rates
        if self.safeguard or not all(rates.values()):
            return None
        trust = self.trust.pending_fraction(sample)
        factor = self.subspace.pending_factor(objective, mix, trust) * max(rates.values())
        names, weight = [*mix.direction], self.slow.weight
        own = multiplied([*mix.direction.values()], factor)
        shares = self._shares(mix, trust, factor, [rates[name] for name in names])
        later = dict(zip(names, _multiplied_each(own, shares)))
        update = dict(zip(names, own))
        later.update({name: later[name].clone() for name in names if name not in followed})
        if known := [name for name in names if name in followed]:
            buffers = [objective.memory[name][BUFFER] for name in known]
            moved = torch._foreach_add([later[n] for n in known], buffers, alpha=1 - weight)
            later.update(zip(known, moved))
            past = [followed[name] for name in known]
            torch._foreach_add_([update[name] for name in known], past, alpha=weight)
        return PreparedUpdate(mix, update, later)

    def _shares(
        self,
        mix: CarriedMix,
        trust: float | Tensor,
        factor: float | Tensor,
        rates: Sequence[float],
    ) -> Tensor:
        """Return the part of the slow momentum in each parameter's step, ``[parameters]``."""
        products, weight = mix.products, self.slow.weight
        own = self.slow.gains.pending_remainders(products, weight, trust, factor / trust)
        places = {layer: index for index, layer in enumerate(products.layers)}
        index = tuple(places[layer_of(name)] for name in mix.direction)
        shares = own.index_select(0, on_device(index, own.device)) * ((1 - weight) / trust)
        if len(set(rates)) == 1:
            return shares if rates[0] == 1 else shares / rates[0]
        return shares / sent_rows([rates], own)[0]

    def is_right(
        self,
        prepared: PreparedUpdate,
        objective: Objective,
        fit: Fit,
        numbers: Sequence[float],
    ) -> bool:
        """Return whether an update is that of a step, now that the host has read its numbers.

        Args:
            prepared: The update.
            objective: The objective.
            fit: The step.
            numbers: The `CarriedMix.numbers` of the update's mix.
        """
        if fit.is_failure or fit.products is None:
            return False
        if fit.is_bounded and objective.settings.damping is not None:
            return False  # the objective is evaluated after such a step
        expected = self.subspace.is_as_expected(objective, prepared.mix, numbers, fit)
        return expected and self.slow.gains.are_as_expected(fit.products)

    def take_(
        self, objective: Objective, prepared: PreparedUpdate, fit: Fit
    ) -> tuple[Direction, dict[str, float]]:
        """Take a step whose update was prepared; return the update, and numbers of the step."""
        rate, update = max(objective.rates.values()), prepared.update
        add_([objective.parameters[name] for name in update], [*update.values()])
        if objective.settings.decoupled_weight_decay:
            decay_(objective, update)
        trust, memory, products = self.trust.fraction, objective.memory, fit.scaled(rate).products
        assert products is not None
        coefficient = self.slow.keep_(memory, prepared.later, products, trust)
        for name, tensor in update.items():
            memory[name][MOMENTUM_BUFFER] = tensor
        own = {"step_size": rate * fit.mix[0], "momentum": coefficient}
        return update, {**own, "predicted": fit.predicted(rate)}


def _multiplied_each(tensors: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """Return each tensor times a number of its own on the device; many small ones are joined.

    These share their memory.
    """
    result: list[Tensor] = list(tensors)
    alike: dict[torch.dtype, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if tensor.numel() <= LARGEST_JOINED_ENTRIES and tensor.is_contiguous():
            alike[tensor.dtype].append(index)
    joined = [own for own in alike.values() if len(own) > SMALLEST_COUNT]
    for own in joined:
        sizes = tuple(tensors[index].numel() for index in own)
        each = _repeated(tuple(own), sizes, factors.device)
        flat = torch.cat([tensors[index].flatten() for index in own])
        parts = torch.split(flat * factors.to(flat.dtype).index_select(0, each), list(sizes))
        for index, part in zip(own, parts):
            result[index] = part.view(tensors[index].shape)
    done = {index for own in joined for index in own}
    alone = [index for index in range(len(tensors)) if index not in done]
    if alone:
        numbers = factors.unbind()
        own_factors = [numbers[index] for index in alone]
        found = torch._foreach_mul([tensors[index] for index in alone], own_factors)
        for index, tensor in zip(alone, found):
            result[index] = tensor
    return result


@lru_cache(maxsize=16)
def _repeated(numbers: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers, each as often as a count says, on a device; sent once."""
    return sent(torch.tensor(numbers).repeat_interleave(torch.tensor(counts)), device)
