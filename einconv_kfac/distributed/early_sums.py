"""Sums that workers begin to add up before their backward passes, and need in the step.

All workers begin the same messages in the same order, on a process group that nothing else uses:

- What is sent was agreed on at the end of the last step: layers, shapes, data types and receivers,
  which are those of an earlier step. Where anything changed since, a worker begins nothing.
- Each small message says how many early ones its worker has begun. Workers that are behind begin
  what is missing, with zeros, before anyone waits for one.
- A worker uses what it received only if all sent what they have in the step. Otherwise the sums are
  sent again in the step; until then every worker has its own ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from einconv_kfac.distributed.collectives import Collectives
from einconv_kfac.distributed.reduction import Reduction
from einconv_kfac.distributed.summable import (
    Summable,
    Wanted,
    counts_of,
    receivers_of,
    tensors_of,
    wanted_of,
)
from einconv_kfac.distributed.triangles import Symmetric

Layers: TypeAlias = Mapping[str, Summable]
Found: TypeAlias = tuple[Tensor, Sequence[Wanted], Sequence[Tensor | None]]
"""The sum of counts, the sums that are wanted, and those that this worker needs."""
_CHANNELS: WeakKeyDictionary[Any, Channel] = WeakKeyDictionary()


@dataclass(frozen=True)
class Content:
    """What one early message adds up.

    Args:
        counts: Numbers of examples and terms, and which sums are there.
        tensors: The sums.
        receivers: The workers that need them.
        dtype: See `Reduction`.
    """

    counts: Tensor
    tensors: Sequence[Tensor | Symmetric]
    receivers: Sequence[int | None]
    dtype: torch.dtype | None

    def zeros(self) -> Content:
        """Return the same without numbers, on no device."""
        meta = [_meta(own) for own in self.tensors]
        counts = torch.empty_like(self.counts, device="meta")
        return Content(counts, meta, self.receivers, self.dtype)

    def on(self, device: torch.device) -> Content:
        """Return zeros on a device."""
        tensors = [_zeros(own, device) for own in self.tensors]
        counts = torch.zeros_like(self.counts, device=device)
        return Content(counts, tensors, self.receivers, self.dtype)


@dataclass(frozen=True)
class Plan:
    """What the next early message is to have.

    Args:
        wanted: The sums.
        receivers: The workers that need them.
        text: All of it as a text.
    """

    wanted: list[Wanted]
    receivers: list[int | None]
    text: str


class Begun:
    """A message that was begun.

    Args:
        content: What it adds up.
        collectives: Those of the process group for early messages.
    """

    def __init__(self, content: Content, collectives: Collectives) -> None:
        self._counts = Reduction([content.counts], [None], collectives)
        own = content.tensors, content.receivers, collectives, content.dtype
        self._tensors = Reduction(*own)

    def begin_(self) -> None:
        """Begin."""
        self._counts.begin_()
        self._tensors.begin_()

    def counts(self) -> Tensor:
        """Wait for the sum of the numbers, and return it."""
        (total,) = self._counts.found()
        assert total is not None
        return total

    def tensors(self) -> list[Tensor | None]:
        """Wait for the sums, and return them."""
        return self._tensors.found()

    def wait(self) -> None:
        """Wait until nothing is sent any more."""
        self._counts.wait()
        self._tensors.wait()


class Channel:
    """The process group for early messages of workers, and what they have begun.

    Attributes:
        device: The device of messages.
        begun: The number of messages that this worker has begun.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives, self.device = collectives, collectives.device
        self.begun = 0
        self._recent: dict[int, Content] = {}  # since the workers were found to be level

    @staticmethod
    def of(group: Any, device: torch.device) -> Channel:
        """Return the channel of the default process group; all of its workers call it."""
        if group not in _CHANNELS:
            options = getattr(group._get_backend(device), "options", None)
            own: Any = dist.new_group(timeout=getattr(options, "_timeout", None))
            _CHANNELS[group] = Channel(Collectives(own, device))
        return _CHANNELS[group]

    def begin_(self, content: Content) -> Begun:
        """Begin a message, and count it."""
        message = Begun(content, self._collectives)
        self._recent[self.begun] = content.zeros()
        self.begun += 1
        message.begin_()
        return message

    def level_(self, collectives: Collectives) -> list[Begun]:
        """Begin what other workers have begun, with zeros; all workers call it.

        Args:
            collectives: Those of the process group for messages of a step.
        """
        others = collectives.objects((self.begun, self._recent))
        last, recent = max(others, key=lambda own: own[0])
        found = [self.begin_(recent[i].on(self.device)) for i in range(self.begun, last)]
        self._recent.clear()
        return found


class EarlySums:
    """The early messages of one optimizer.

    Torch makes process groups with all processes together, so that only those of the default
    group have another one.

    Args:
        group: The process group of the workers.
        dtype: The data type in which sums of matrices are sent.

    Attributes:
        channel: The process group for them, once it is made.
        is_wanted: Whether any plan was made.
    """

    def __init__(self, group: Any, dtype: torch.dtype | None) -> None:
        self.channel: Channel | None = None
        self.is_wanted = False
        self._is_possible = group is dist.group.WORLD
        self._dtype = dtype
        self._known: dict[str, tuple[Wanted, ...]] = {}
        self._forms: dict[str, Any] = {}
        self._plan: Plan | None = None
        self._agreed: Plan | None = None
        self._current: Begun | None = None
        self._left: list[Begun] = []

    @property
    def count(self) -> int:
        """The number of messages that this worker has begun."""
        return 0 if self.channel is None else self.channel.begun

    @property
    def is_current(self) -> bool:
        """Whether a message has what this worker has."""
        return self._current is not None

    def learn_(self, layers: Layers, wanted: Sequence[Wanted]) -> None:
        """Keep which sums of layers some worker had."""
        for name, layer in layers.items():
            self._known[name] = tuple(own for own in wanted if own.layer == name)
            self._forms[name] = _form(layer)

    def plan_(self, layers: Layers, owners: Mapping[str, int]) -> None:
        """Plan a message with sums of layers, instead of any earlier plan.

        Args:
            layers: The layers, with sums or without.
            owners: The workers that alone need the sums of layers.
        """
        self.drop_()
        self.is_wanted, self._plan = self._is_possible, None
        if layers and all(self._forms.get(name) == _form(own) for name, own in layers.items()):
            wanted = [own for name in sorted(layers) for own in self._known[name]]
            receivers = receivers_of(layers, wanted, owners)
            forms = [self._forms[name] for name in sorted(layers)]
            self._plan = Plan(wanted, receivers, repr((wanted, receivers, forms)))

    def agree_(self) -> str:
        """Return the plan as a text, which is compared at the end of a step."""
        self._agreed = self._plan
        return "" if self._plan is None else self._plan.text

    def begin_(self, layers: Callable[[], Layers], agrees: Callable[[], bool]) -> None:
        """Begin to add sums up, if that was planned.

        Args:
            layers: Returns the layers of the plan, with what this worker has.
            agrees: Returns whether all workers had the same plan at the end of the last step.
        """
        if self.channel is None or self._plan is None or self._agreed is not self._plan:
            return
        own = layers()
        wanted = self._plan.wanted
        counts = counts_of(own, self.channel.device)
        if not {*wanted_of(own, counts)} <= {*wanted} or not agrees():
            return
        content = Content(counts, tensors_of(own, wanted), self._plan.receivers, self._dtype)
        self._current = self.channel.begin_(content)

    def drop_(self) -> None:
        """Do not use the message that was begun."""
        if self._current is not None:
            self._left.append(self._current)
            self._current = None

    def level_(self, collectives: Collectives) -> None:
        """See `Channel`."""
        assert self.channel is not None
        self._left += self.channel.level_(collectives)

    def found(self, layers: Layers) -> Found | None:
        """Return the sums that all workers sent early; ``None`` if other ones are wanted.

        Args:
            layers: The layers.
        """
        message, plan = self._current, self._plan
        assert message is not None
        assert plan is not None
        self.drop_()
        total = message.counts()
        if wanted_of(layers, total) != plan.wanted:
            return None
        return total, plan.wanted, message.tensors()

    def finish_(self) -> None:
        """Wait for the messages that are left, which all workers have begun."""
        while self._left:
            self._left.pop().wait()


def _form(layer: Summable) -> list[tuple[tuple[int, ...], bool, bool]]:
    """Return the form of a layer's sums."""
    return [(part.shape, part.symmetric, part.for_all) for part in layer.parts()]


def _meta(tensor: Tensor | Symmetric) -> Tensor | Symmetric:
    if isinstance(tensor, Symmetric):
        return Symmetric(torch.empty_like(tensor.matrices, device="meta"))
    return torch.empty_like(tensor, device="meta")


def _zeros(tensor: Tensor | Symmetric, device: torch.device) -> Tensor | Symmetric:
    if isinstance(tensor, Symmetric):
        return Symmetric(torch.zeros_like(tensor.matrices, device=device))
    return torch.zeros_like(tensor, device=device)
