"""Calls of layers whose factors cannot be computed."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from einconv_kfac.curvature.estimation.capture import LayerCall

SPARSE_LAYOUTS = frozenset(
    {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
)
"""The layouts of tensors that keep the entries other than zero."""


def scattered_rows(layer: str) -> ValueError:
    """Return the error for rows that are not known to belong to certain examples."""
    return ValueError(
        f"The calls of '{layer}' must each have rows of all examples in the same order, got calls "
        "of some examples, or rows in no regular order. Use approximation='expand', "
        "factor_fraction=1, and no squared gradients of examples ('ekfac', 'diagonal'), or leave "
        f"the layer out: exclude=['{layer}']."
    )


def check_batched(calls: Iterable[LayerCall]) -> None:
    """Raise a ``ValueError`` if a call had an input without a dimension of examples."""
    for call in calls:
        if call.is_unbatched:
            raise _no_batch(call, call.x.shape[1:])


def _no_batch(call: LayerCall, shape: torch.Size) -> ValueError:
    """Return the error for an input that is not a batch."""
    is_empty = shape[:1] == (0,)
    remedy = "Add a batch dimension with `x.unsqueeze(0)`"
    return ValueError(
        f"The input of '{call.layer}' ({type(call.module).__name__}) must be a non-empty batch "
        f"[n, ...], got shape {list(shape)}. {'Leave out such batches' if is_empty else remedy}."
    )


def check_call(call: LayerCall) -> None:
    """Raise a ``ValueError`` if a call does not show what a layer computes for a batch."""
    kind = type(call.module).__name__
    if call.x.layout in SPARSE_LAYOUTS:
        raise ValueError(
            f"The input of '{call.layer}' ({kind}) must be dense, got a sparse tensor "
            f"({call.x.layout}). Pass `x.to_dense()`, or leave the layer out: "
            f"exclude=['{call.layer}']."
        )
    if not call.is_batch:
        raise _no_batch(call, call.x.shape)
    if not call.is_own:
        raise ValueError(
            f"The first forward hook of '{call.layer}' ({kind}) must be the one that records its "
            "output, got another one before it, which may change the output. Register it without "
            f"`prepend` and not for all modules, or leave the layer out: exclude=['{call.layer}']."
        )
