"""Random numbers that depend on the seed, the step and the micro-batch alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator


def stream(device: torch.device | str, purpose: str, seed: int, step: int, batch: int) -> Generator:
    """Return a random generator at the beginning of a stream of its own.

    There is no state to save, and the numbers are the same however the micro-batches of a step
    are divided among workers.

    Args:
        device: The generator's device.
        purpose: What is drawn; streams of different purposes are independent.
        seed: The optimizer's seed.
        step: The number of steps taken.
        batch: The number of the micro-batch among those of all workers.
    """
    text = f"{purpose} {seed} {step} {batch}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
