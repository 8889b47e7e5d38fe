"""A loss between its computation and its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from einconv_kfac.curvature.estimation.capture import LayerCall, may_be_unbatched
from einconv_kfac.curvature.estimation.evaluation import Evaluation, RuleEvaluation
from einconv_kfac.curvature.losses import has_rule
from einconv_kfac.curvature.losses.loss_call import Targets, depends_on_parameters
from einconv_kfac.curvature.losses.loss_registry import is_overridden
from einconv_kfac.curvature.losses.snapshot import copied, snapshot
from einconv_kfac.curvature.objective.graph import Edge
from einconv_kfac.curvature.objective.loss_model import GivenLoss
from einconv_kfac.optim.recording.kept_calls import DROPPED
from einconv_kfac.optim.recording.pending import PendingCalls
from einconv_kfac.optim.recording.pending_call import PendingCall
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.chain import Source, dependences_of, needed
from einconv_kfac.optim.replay.environment import Autocast
from einconv_kfac.optim.replay.forward import ForwardPass
from einconv_kfac.optim.replay.loss_input import Inside, LossInput, Returned
from einconv_kfac.optim.replay.versions import Versions


class Observation(Protocol):
    """A loss that may be backpropagated later."""

    @property
    def is_assumed(self) -> bool:
        """Whether it is taken for a loss since the model returned it."""

    @property
    def root(self) -> Edge | None:
        """Its edge; ``None`` if numbers that the model returned are no parts of it."""

    def evaluation(self, weight: Tensor) -> tuple[Evaluation, list[LayerCall]]:
        """Return the loss and the calls of layers, while its graph exists.

        Args:
            weight: The derivative of the objective with respect to the loss, shaped like it.
        """

    def batch(self, evaluation: Evaluation, weight: Tensor, *, replayed: bool) -> Batch:
        """Return the batch, after `evaluation`.

        Args:
            evaluation: What `evaluation` returned.
            weight: See `evaluation`.
            replayed: Whether the batch is to be replayed.
        """


class GivenObservation:
    """A loss module that was called on an output of the model.

    Args:
        loss_fn: The loss as it was at the call.
        arguments: Its arguments.
        loss: The loss, detached.
        owner: The call of the model, and which of its tensors the first argument is.
        layer_calls: The calls of layers up to the loss.
    """

    is_assumed = False
    root = None

    def __init__(
        self,
        loss_fn: nn.Module,
        arguments: Sequence[Any],
        loss: Tensor,
        owner: tuple[PendingCall, LossInput],
        layer_calls: list[LayerCall],
    ) -> None:
        self._loss_fn, self._loss, self._layer_calls = loss_fn, loss, layer_calls
        self._output, *self._targets = arguments
        self._owner, self._autocast = owner, Autocast.now(self._output.device.type)
        self._written = Versions([("the output", self._output.detach())])
        self._versions = Versions(("a target of the loss", target) for target in self._targets)

    @staticmethod
    def of(
        loss_fn: nn.Module,
        arguments: Sequence[Any],
        loss: Tensor,
        pending: PendingCalls,
        inside: Inside | None,
    ) -> GivenObservation | None:
        """Return the observation, or ``None`` if the loss is to be read off its graph.

        That is so without a rule for it or an output of the model, and for outputs that may have
        no dimension of examples.
        """
        owner = pending.owner_of(arguments[0], inside)
        is_known = has_rule(loss_fn) and not is_overridden(loss_fn)
        is_known = is_known and not depends_on_parameters(tuple(arguments[1:]))
        if owner is None or owner[0].call is None or not is_known:
            return None
        if isinstance(owner[1], Returned) and not owner[0].is_intact(owner[1]):
            return None
        calls = pending.layer_calls()
        if may_be_unbatched(arguments[0], calls):
            return None
        owner[0].used = True
        pending.account.add_rule_(loss_fn)
        own = snapshot(loss_fn)
        return GivenObservation(own, arguments, loss.detach(), owner, calls)

    def evaluation(self, weight: Tensor) -> tuple[Evaluation, list[LayerCall]]:
        """See `Observation`."""
        targets = self._targets
        target = targets[0] if len(targets) == 1 else Targets(targets)
        own = self._loss_fn, self._output, target
        return RuleEvaluation(*own, settings=self._autocast.restored), self._layer_calls

    def batch(self, evaluation: Evaluation, weight: Tensor, *, replayed: bool) -> Batch:
        """See `Observation`."""
        output, targets, versions = self._output.detach(), self._targets, self._versions
        if replayed and versions.changed() is None:
            targets = [copied(target) for target in targets]
            versions = Versions(("a target of the loss", target) for target in targets)
        return Batch(
            forward_passes([(self._owner[0], [self._owner[1]])]),
            (output,),
            (),
            GivenLoss.recorded(self._loss_fn, output, targets, self._loss) if replayed else None,
            self._loss,
            weight,
            versions,
            written=self._written,
        )


def forward_passes(
    given: Sequence[tuple[PendingCall, Sequence[LossInput]]],
) -> tuple[ForwardPass, ...]:
    """Return the passes of calls and of all calls that they depend on, in their order.

    Args:
        given: Calls, with the tensors that a loss depends on.

    Raises:
        RuntimeError: If one of these calls was dropped.
    """
    calls, passed = dict[int, PendingCall](), dict[Source, None]()
    waiting = [(pending, source) for pending, own in given for source in own]
    while waiting:
        pending, source = waiting.pop()
        further = dependences_of(pending.vectors, [source])
        if pending.number not in calls and pending.call is not None:
            calls[pending.number] = pending
            further += [each.own for each in pending.call.chained]
        for number, other in needed(further):
            if (number, other) not in passed:
                passed[number, other] = None
                waiting.append((_call(pending, number), other))
    inputs = {pending.number: tuple(own) for pending, own in given}
    found: list[ForwardPass] = []
    for number, pending in sorted(calls.items()):
        assert pending.call is not None
        later = tuple(source for at, source in passed if at == number)
        own = inputs.get(number, ())
        found.append(ForwardPass(pending.call, own, number, later, vectors=pending.vectors))
    return tuple(found)


def _call(pending: PendingCall, number: int) -> PendingCall:
    """Return a call, or one that it depends on, by its number."""
    if number == pending.number:
        return pending
    other = pending.others.get(number)
    found = pending.earlier.get(number) if other is None else other()
    if found is None:
        raise RuntimeError(DROPPED)
    return found
