"""The processor of this machine, as far as it decides which library multiplies faster."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux describes the processor. Other systems have no such file."""

INTEL = "GenuineIntel"
AMD = "AuthenticAMD"

ZEN_4_FAMILY = 25
"""The number of AMD's last family of processors with 256-bit units for 512-bit vectors."""


@dataclass(frozen=True)
class Processor:
    """A processor.

    Args:
        vendor: The vendor's identification string, empty if unknown.
        family: The vendor's number of the family, 0 if unknown.
        vector_bits: Width of the vectors that torch's kernels use.
    """

    vendor: str = ""
    family: int = 0
    vector_bits: int = 0

    @property
    def mkl_is_narrow(self) -> bool:
        """Whether MKL uses narrower vectors than the processor has.

        MKL uses the full width on Intel's processors only.
        """
        return self.vector_bits >= 512 and self.vendor not in ("", INTEL)

    @property
    def is_double_pumped(self) -> bool:
        """Whether this is one of AMD's processors before Zen 5.

        They compute each half of a 512-bit vector in turn, so that the width saves little time.
        """
        return self.vendor == AMD and 0 < self.family <= ZEN_4_FAMILY


def parsed(cpuinfo: str, vector_bits: int) -> Processor:
    """Return the processor that the text of ``/proc/cpuinfo`` describes."""
    vendor = re.search(r"vendor_id\s*:\s*(\S+)", cpuinfo)
    family = re.search(r"cpu family\s*:\s*(\d+)", cpuinfo)
    return Processor(vendor[1] if vendor else "", int(family[1]) if family else 0, vector_bits)


def detected() -> Processor:
    """Return the processor of this machine."""
    text = CPUINFO.read_text() if CPUINFO.is_file() else ""
    capability = torch.backends.cpu.get_cpu_capability()
    return parsed(text, {"AVX512": 512, "AVX2": 256}.get(capability, 128))
