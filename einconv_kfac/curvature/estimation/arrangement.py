"""The calls of one batch, arranged so that their first dimension is that of the examples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from einconv_kfac.curvature.estimation.arranged_call import ArrangedCall
from einconv_kfac.curvature.estimation.call_checks import check_call
from einconv_kfac.curvature.estimation.call_kinds import Signature, signatures_of
from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.estimation.example_layout import (
    SCATTERED,
    ExampleLayout,
    candidates,
)
from einconv_kfac.curvature.estimation.layout_probes import (
    AskedLayouts,
    Probed,
    bit_probes,
    meets,
    probes,
)
from einconv_kfac.curvature.estimation.row_moves import RowMoves
from einconv_kfac.curvature.estimation.row_owners import Check, belong_to_others, multiplied

Backpropagate: TypeAlias = "Callable[[Sequence[Tensor], Sequence[LayerCall]], list[Tensor | None]]"
"""Returns the gradients at calls for vectors at the outputs of the model."""
Layouts: TypeAlias = "dict[Signature, ExampleLayout | None]"
"""Layouts that were found by probes, by the kind of call."""


@dataclass(frozen=True)
class Arrangement:
    """Arranges the calls of one batch; two probes find the layouts that are not known.

    Args:
        outputs: Tensors like the outputs of the model, ``[n, ...]``.
        graph: The outputs with their graph.
        examples: The number of examples.
        layouts: The known layouts, which are added to.
        backpropagate: Runs a backward pass.
        by_example: Whether shared rows need a gradient for each example.
        tells_shared: Whether rows in no regular order are told from those that examples share.
        owned: The layers whose sums need to know the example of each row.
    """

    outputs: Sequence[Tensor]
    graph: Sequence[Tensor | GradientEdge]
    examples: int
    layouts: Layouts
    backpropagate: Backpropagate
    by_example: bool
    tells_shared: bool
    owned: Collection[str] = ()

    @cached_property
    def _moves(self) -> RowMoves:
        """What the graph does with rows of examples."""
        return RowMoves(self.graph)

    @property
    def _needs_owners(self) -> bool:
        """Whether it matters in each batch which examples rows belong to."""
        return self.tells_shared or bool(self.owned)

    def ask(self, calls: Sequence[LayerCall]) -> AskedLayouts | None:
        """Ask a GPU for the layouts that `arranged_` will need; ``None`` where it needs none.

        Args:
            calls: Calls, also those that the outputs may not depend on.
        """
        if not any(call.x.is_cuda for call in calls) or not self._new(calls):
            return None
        own = [call for call in calls if call.output.node in self._moves.reached]
        if not all(call.is_batch and call.is_own for call in own):
            return None  # an error, which `arranged_` raises
        new = self._new(own)
        return self._probed([own[index] for index in new]) if new else None

    def arranged_(
        self, calls: Sequence[LayerCall], asked: AskedLayouts | None = None
    ) -> list[ArrangedCall]:
        """Return calls with their layouts, and keep these.

        Args:
            calls: The calls.
            asked: What `ask` returned.

        Layers some of whose calls alone have rows in no regular order are treated as layers whose
        rows are shared. Rows that data choose are checked in each batch: they may look regular.

        Raises:
            ValueError: If a call is not a batch, or a hook may have changed its output.
        """
        for call in calls:
            check_call(call)
        signatures = signatures_of(calls, self.examples)
        self._find_(calls, signatures, asked)
        arranged = self._arranged(calls, signatures, self.layouts)
        wrong = self._only_look_regular(arranged)
        return [
            replace(each, layout=SCATTERED, is_scattered=True) if each.call.layer in wrong else each
            for each in arranged
        ]

    def _only_look_regular(self, arranged: Sequence[ArrangedCall]) -> set[str]:
        """Return owned layers with rows that data give to other examples than layouts do."""
        own = [a for a in arranged if a.call.layer in self.owned and a.is_regular]
        calls = [each.call for each in own]
        if self.examples == 1 or not calls or self._moves.normalises_batches:
            return set()
        if not self._moves.may_move(calls):
            return set()
        checks = self._checks(calls)
        flags = [belong_to_others(a.layout, each) for a, each in zip(own, checks) if a.layout]
        found = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
        return {each.call.layer for each, is_other in zip(own, found) if is_other}

    def guessed(self, calls: Sequence[LayerCall]) -> list[ArrangedCall] | None:
        """Return calls with their usual layouts where these are not known.

        They are as a rule those that `arranged_` returns, but the host waits for nothing; ``None``
        if a call can have no layout.
        """
        signatures = signatures_of(calls, self.examples)
        usual = dict(self.layouts)
        for index in self._new(calls):
            call = calls[index]
            if not (possible := candidates(call.x.shape, call.y_shape, self.examples)):
                return None
            usual[signatures[index]] = possible[0]
        return self._arranged(calls, signatures, usual)

    def _arranged(
        self, calls: Sequence[LayerCall], signatures: Sequence[Signature], known: Layouts
    ) -> list[ArrangedCall]:
        """Return calls with known layouts; see `arranged_`."""
        examples = self.examples
        scattered = {c.layer for c, s in zip(calls, signatures) if known.get(s) == SCATTERED}
        found = [
            known[signature] if signature in known else _guessed(call, examples, scattered)
            for call, signature in zip(calls, signatures)
        ]
        shared = {call.layer for call, own in zip(calls, found) if own is None}

        def settled(
            call: LayerCall, signature: Signature, own: ExampleLayout | None
        ) -> ExampleLayout | None:
            if call.layer in shared and (own in (SCATTERED, None) or signature not in known):
                return None
            return SCATTERED if call.layer in scattered else own

        found = [settled(*each) for each in zip(calls, signatures, found)]
        mixed = {c.layer for c, e in zip(calls, found) if e is not None}
        return [
            ArrangedCall(c, e, self.by_example or c.layer in mixed, examples, c.layer in scattered)
            for c, e in zip(calls, found)
        ]

    def _new(self, calls: Sequence[LayerCall]) -> list[int]:
        """Return the indices of calls whose layouts are found by probes; see `RowMoves`."""
        if self.examples <= 1:
            return []
        moves = self._needs_owners and self._moves.may_move(calls)
        signatures = signatures_of(calls, self.examples)
        return [i for i, s in enumerate(signatures) if moves or s not in self.layouts]

    def _probed(self, calls: Sequence[LayerCall]) -> AskedLayouts:
        """Return the layouts of calls, for which the device is asked."""
        mixes = self._moves.normalises_batches
        passes = [self.backpropagate(vectors, calls) for vectors in probes(self.outputs)]
        checks = self._checks(calls) if self.by_example and not mixes else [[] for _ in calls]
        probed = [
            Probed(call, own, self.examples, check)
            for call, check, *own in zip(calls, checks, *passes)
        ]
        return AskedLayouts(probed, mixes=mixes)

    def _checks(self, calls: Sequence[LayerCall]) -> list[list[Check]]:
        """Return by call what shows rows of other examples, see `Probed`."""
        vectors, others = multiplied(self.outputs, self.examples)
        first = self.backpropagate(vectors, calls)
        seconds = [(powers, self.backpropagate(own, calls)) for powers, own in others]
        return [
            [(powers, first[i], second[i]) for powers, second in seconds] for i in range(len(calls))
        ]

    def _find_(
        self,
        calls: Sequence[LayerCall],
        signatures: Sequence[Signature],
        asked: AskedLayouts | None,
    ) -> None:
        """Find the layouts that are not known, and keep them; see `arranged_`."""
        layouts = self.layouts
        if self.examples == 1:
            for call, signature in zip(calls, signatures):
                possible = candidates(call.x.shape, call.y_shape, 1)
                layouts.setdefault(signature, possible[0] if possible else None)
            return
        if not self._needs_owners:  # in calls of other sizes as well, for factors of one scale
            unordered = {s[:4]: e for s, e in layouts.items() if e in (SCATTERED, None)}
            layouts.update({s: unordered[s[:4]] for s in signatures if s[:4] in unordered})
        if not (new := self._new(calls)):
            return
        for i in new:
            layouts.pop(signatures[i], None)
        chosen = [calls[i] for i in new]
        if asked is None or not asked.are_of(chosen):
            asked = self._probed(chosen)
        found = zip(new, asked.read())
        layouts.update({signatures[i]: e for i, (is_reached, e) in found if is_reached})
        if self.tells_shared:
            others = [i for i in new if layouts.get(signatures[i], SCATTERED) == SCATTERED]
            several = self._shared(calls, others)
            layouts.update(dict.fromkeys((signatures[i] for i in several), None))

    def _shared(self, calls: Sequence[LayerCall], indices: Sequence[int]) -> set[int]:
        """Return which of some calls have rows that several examples share.

        Any two examples differ in a bit of their numbers, so for each bit the gradients of the
        examples that have it and of those that lack it are compared.
        """
        chosen, shared = [calls[i] for i in indices], set()
        for pair in bit_probes(self.outputs, self.examples) if indices else ():
            passes = [self.backpropagate(vectors, chosen) for vectors in pair]
            for index, call, one, other in zip(indices, chosen, *passes):
                if one is not None and other is not None and meets(call, one, other):
                    shared.add(index)
        return shared


def _guessed(call: LayerCall, examples: int, scattered: set[str]) -> ExampleLayout:
    """Return the layout of a call that no probe reached, as those of examples that it lacks."""
    possible = candidates(call.x.shape, call.y_shape, examples)
    return possible[0] if possible and call.layer not in scattered else SCATTERED
