"""The settings that are tried; each searched optimizer has the same number of trials."""

from __future__ import annotations

from typing import Any

from evidence.task import Task

LEARNING_RATES = {
    "SGD": (3e-3, 0.5),
    "AdamW": (1e-3, 4e-2),
    "SOAP": (2e-3, 0.1),
    "Muon": (1e-3, 4e-2),
    "SINGD": (1e-3, 0.1),
    "asdl K-FAC": (0.01, 1.0),
    "KFAC fixed": (0.01, 0.3),
}
"""Smallest and largest learning rates, where the family of the task has no others."""
DAMPINGS = {"SINGD": (1e-4, 1e-1), "asdl K-FAC": (1e-3, 1.0), "KFAC fixed": (1e-3, 1.0)}
"""Smallest and largest damping."""
KFAC_SETTINGS: tuple[dict[str, Any], ...] = (
    {"lr": 0.3},
    {"fisher": "forward-only"},
    {"scheduled": True},
    {"fisher": "forward-only", "scheduled": True},
    {"approximation": "reduce"},
    {"factor_update_period": 5, "inverse_update_period": 20},
    {"fisher": "empirical"},
    {"mc_samples": 4},
)
"""Settings of the automatic K-FAC, beside its defaults; some with the schedule of the peers."""


def settings(optimizer: str, task: Task, trials: int) -> list[dict[str, Any]]:
    """Return the settings that are tried.

    Learning rates are spaced evenly on a logarithmic scale. Dampings advance by the golden section
    on such a scale, so that they are hardly correlated with the learning rates. KFAC on its
    defaults has a single setting; KFAC tuned has `KFAC_SETTINGS`.
    """
    if optimizer == "KFAC":
        return [{}]
    if optimizer == "KFAC tuned":
        return [dict(setting) for setting in KFAC_SETTINGS[:trials]]
    low, high = {**LEARNING_RATES, **task.family.rates}[optimizer]
    tried: list[dict[str, Any]] = [
        {"lr": _between(low, high, (index + 0.5) / trials)} for index in range(trials)
    ]
    if optimizer in DAMPINGS:
        low, high = DAMPINGS[optimizer]
        for index, setting in enumerate(tried):
            setting["damping"] = _between(low, high, (0.5 + 0.618034 * index) % 1)
    return tried


def _between(low: float, high: float, fraction: float) -> float:
    """Return the number at ``fraction`` between two on a logarithmic scale, to 3 digits."""
    return float(f"{low * (high / low) ** fraction:.3g}")
