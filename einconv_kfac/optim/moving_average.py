"""Exponential moving averages without a bias towards their initial value."""

from __future__ import annotations


def bias_corrected_weight(decay: float, updates: int) -> float:
    """Return the weight ``w`` of a new value in ``average + w (value - average)``.

    With it the average after ``n`` updates is ``sum_i decay^(n - i) x_i``, divided by the sum of
    these coefficients: the exponential moving average with the bias correction of Adam (Kingma
    and Ba, 2015). The first update replaces the initial value.

    Args:
        decay: Decay of the average, in ``[0, 1)``.
        updates: Number of updates, the new one included.

    >>> bias_corrected_weight(0.9, updates=1)
    1.0
    >>> round(bias_corrected_weight(0.9, updates=1000), 6)
    0.1
    """
    return (1 - decay) / (1 - decay**updates)
