"""Keeps the simulated device out of this process, unless it was loaded before torch."""

from __future__ import annotations

import sys

collect_ignore = ["simulation"] if "simulated_device" in sys.modules else ["simulation", "checks"]
