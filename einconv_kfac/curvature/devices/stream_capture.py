"""Whether a CUDA graph is capturing what is asked of the device."""

from __future__ import annotations

import torch


def is_capturing() -> bool:
    """Return whether the present stream is being captured: nothing is computed then.

    CUDA is not initialised by the question.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.cuda.is_current_stream_capturing())
