"""Running averages of Kronecker factors: collected, averaged, refreshed."""
