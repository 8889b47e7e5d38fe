"""Processors to simulate: one of each kind that algorithms or libraries differ on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from einconv_kfac.curvature.devices.device_registry import PROFILES
from einconv_kfac.curvature.devices.processor import AMD, INTEL, Processor
from einconv_kfac.curvature.devices.profiles.cpu import profile_on
from einconv_kfac.curvature.factors.choice import choose

PROCESSORS = {
    "intel-avx512": Processor(INTEL, 6, 512),
    "amd-avx512-double-pumped": Processor(AMD, 25, 512),
    "amd-avx512": Processor(AMD, 26, 512),
    "no-avx512": Processor(AMD, 25, 256),
    "unknown": Processor("", 0, 512),
}


def simulate(kind: str) -> None:
    """Compute as on a processor of a kind from now on, with this processor's speed."""
    PROFILES["cpu"] = profile_on(PROCESSORS[kind])
    choose.cache_clear()


@contextmanager
def simulated(kind: str) -> Iterator[None]:
    """Compute as on a processor of a kind within the context."""
    before = PROFILES["cpu"]
    simulate(kind)
    try:
        yield
    finally:
        PROFILES["cpu"] = before
        choose.cache_clear()
