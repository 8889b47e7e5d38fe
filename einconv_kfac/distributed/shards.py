"""Models of which each worker stores a part, as `fully_shard` (FSDP2) divides them.

At rest, each worker has some rows of every parameter, of its gradient and of its state. A step
gathers them, is that of workers with whole parameters, and leaves each worker its rows of the
result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from einconv_kfac.distributed.stored import is_divided, local_of, pair_, stored_of
from einconv_kfac.distributed.workers import Workers
from einconv_kfac.torch_versions import all_gather_single, parameter_groups

State: TypeAlias = dict[str, Any]
States: TypeAlias = Mapping[str, State]
Rows: TypeAlias = tuple[list[Tensor], list[Tensor]]


class WholeModel:
    """A model of which each worker has all parameters: everything is as it is."""

    is_divided = False

    def divide_(self) -> None:
        """Have the model's parameters be those that optimizers have, also after an evaluation."""

    def gathered(self, workers: Workers) -> AbstractContextManager[None]:
        """Return a context in which the model has whole parameters, for a step.

        Args:
            workers: The workers, which agree before a large message.
        """
        return nullcontext()

    def apart(self, is_needed: bool) -> AbstractContextManager[None]:
        """Return a context for backward passes of which each worker may run another number.

        All workers enter it, at the beginning of a backward pass of all.

        Args:
            is_needed: Whether there are such passes, the same on all workers.
        """
        return nullcontext()

    def whole(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return whole tensors; all workers call it with tensors of the same shapes."""
        return list(tensors)

    def whole_states(self, states: States) -> dict[str, State]:
        """Return states of parameters with whole tensors, by name."""
        return dict(states)

    def keep_(
        self, kept: MutableMapping[Any, State], parameters: Mapping[str, Tensor], states: States
    ) -> None:
        """Take over states of parameters.

        Args:
            kept: The states that an optimizer has.
            parameters: The parameters by name.
            states: Their whole states, as `whole_states` returned them and a step changed them.
        """

    def rows(self, parameters: Iterable[Tensor]) -> Rows:
        """Return what is stored of parameters, and the rows of them that belong there."""
        return [], []


WHOLE = WholeModel()


class DividedModel(WholeModel):
    """A model that `fully_shard` divides by rows among the workers of one process group.

    Args:
        model: The model.
    """

    is_divided = True

    def __init__(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415

        self._model = model
        self._divided: list[Any] = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._is_paired = False

    def divide_(self) -> None:
        """See `WholeModel`."""
        for module in self._divided:
            module.reshard()

    @contextmanager
    def gathered(self, workers: Workers) -> Iterator[None]:
        """See `WholeModel`; hooks of torch that gather and divide are left out meanwhile."""
        self.divide_()
        workers.agree(torch.ones(()), "are all ready to gather")
        stored = dict(self._model.named_parameters())
        try:
            for module in self._divided:
                module.unshard()
            if not self._is_paired:
                for name, leaf in self._model.named_parameters():
                    pair_(stored[name], leaf)
                self._is_paired = True
            with _without_hooks(self._model):
                yield
        finally:
            self.divide_()

    @contextmanager
    def apart(self, is_needed: bool) -> Iterator[None]:
        """See `WholeModel`; nothing is sent inside, nor gathered in advance after it."""
        if not is_needed:
            yield
            return
        for module in self._divided:
            module.unshard()
        groups = [group for module in self._divided for group in parameter_groups(module)]
        before = [(own.reshard_after_backward, own.reduce_grads) for own in groups]
        for own in groups:
            own.reshard_after_backward = own.reduce_grads = False
            own._post_forward_indices.clear()
        try:
            yield
        finally:
            for own, (divides, sends) in zip(groups, before):
                own.reshard_after_backward, own.reduce_grads = divides, sends

    def whole(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `WholeModel`."""
        by_kind: dict[Any, list[int]] = defaultdict(list)
        for index, tensor in enumerate(tensors):
            if is_divided(tensor):
                by_kind[tensor.dtype].append(index)
        found = list(tensors)
        for indices in by_kind.values():
            for index, tensor in zip(indices, _gathered([tensors[i] for i in indices])):
                found[index] = tensor
        return found

    def whole_states(self, states: States) -> dict[str, State]:
        """See `WholeModel`."""
        keys = [
            (name, key)
            for name, state in states.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        ]
        found = {name: dict(state) for name, state in states.items()}
        for (name, key), tensor in zip(keys, self.whole([states[n][k] for n, k in keys])):
            found[name][key] = tensor
        return found

    def keep_(
        self, kept: MutableMapping[Any, State], parameters: Mapping[str, Tensor], states: States
    ) -> None:
        """See `WholeModel`."""
        for name, state in states.items():
            owner = stored_of(parameters[name])
            kept[owner] = {
                key: divided(value, owner) if _is_like(value, owner) else value
                for key, value in state.items()
            }

    def rows(self, parameters: Iterable[Tensor]) -> Rows:
        """See `WholeModel`."""
        stored, parts = [], []
        for parameter in parameters:
            owner = stored_of(parameter)
            start, length = _row_range(owner)
            if length:
                stored.append(local_of(owner))
                parts.append(parameter.detach()[start : start + length])
        return stored, parts


def divided(whole: Tensor, like: Tensor) -> Tensor:
    """Return a DTensor of which this worker has the rows that it has of another one.

    Args:
        whole: The whole tensor, shaped like the other one.
        like: The other one, a DTensor.
    """
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    own: Any = like
    start, length = _row_range(like)
    rows = whole[start : start + length].contiguous().clone()
    found: Tensor = DTensor.from_local(
        rows,
        own.device_mesh,
        own.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.contiguous().stride(),
    )
    return found


def _gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return whole tensors from the rows of all workers, in one message; they have one dtype."""
    first: Any = tensors[0]
    group = first.device_mesh.get_group()
    size = torch.distributed.get_world_size(group)
    ranges = [[_rows_of(len(t), rank, size) for t in tensors] for rank in range(size)]
    widths = [t.shape[1:].numel() for t in tensors]
    sizes = [[length * w for (_, length), w in zip(own, widths)] for own in ranges]
    longest = max(sum(own) for own in sizes)
    sent = torch.cat([local_of(t).flatten() for t in tensors])
    sent = torch.nn.functional.pad(sent, (0, longest - len(sent)))
    received = sent.new_empty(size * longest)
    all_gather_single(received, sent, group=group)
    by_worker = zip(torch.split(received, longest), sizes)
    parts = [torch.split(rows[: sum(own)], own) for rows, own in by_worker]
    return [torch.cat(own).view(t.shape) for t, own in zip(tensors, zip(*parts))]


def _rows_of(count: int, rank: int, size: int) -> tuple[int, int]:
    """Return the first row of a worker and the number of its rows, as ``torch.chunk`` divides."""
    longest = -(-count // size)
    start = min(rank * longest, count)
    return start, min(longest, count - start)


def _row_range(parameter: Tensor) -> tuple[int, int]:
    """Return the first row of a DTensor that this worker has, and the number of its rows."""
    own: Any = parameter
    group = own.device_mesh.get_group()
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    return _rows_of(len(parameter), rank, size)


def _is_like(value: Any, owner: Tensor) -> bool:
    """Return whether a value is a tensor with an entry for each of a parameter."""
    return isinstance(value, Tensor) and value.shape == owner.shape


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Take the hooks of `fully_shard` off a model inside the block."""
    changed = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            own: Any = hooks
            if any(_is_dividing(hook) for hook in own.values()):
                changed.append((own, dict(own)))
    for hooks, before in changed:
        for key in [key for key, hook in before.items() if _is_dividing(hook)]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, before in changed:
            present = dict(hooks)
            kept = {k: hook for k, hook in before.items() if k in present or _is_dividing(hook)}
            hooks.clear()
            hooks.update({**kept, **present})


def _is_dividing(hook: Any) -> bool:
    """Return whether a hook is one of `fully_shard`."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
