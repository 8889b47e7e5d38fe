"""Simplification of a network by rewrite rules."""

from __future__ import annotations

from einconv_kfac.network.cache import cached
from einconv_kfac.network.network import Network, check_network
from einconv_kfac.network.rules import RULES


@cached(maxsize=1024)
def simplified(network: Network) -> Network:
    """Return the network with the rewrite rules applied until none applies.

    The value, the shape of the result and the order of the caller's tensors do not change.

    Raises:
        TypeError: If the argument is no network.
    """
    check_network(network)
    while (simpler := _rewritten(network)) is not None:
        network = simpler
    return network


def _rewritten(network: Network) -> Network | None:
    """Return the network after the first rule that applies, or None if none does."""
    for rule in RULES:
        if (simpler := rule(network)) is not None:
            return simpler.after(rule.__name__)
    return None
