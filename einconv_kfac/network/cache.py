"""Bounded caches, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from einconv_kfac.geometry.parsing import cached_geometry

Result = TypeVar("Result")


class CacheInfo(NamedTuple):
    """Hits and misses of a cache, its bound, and its number of values."""

    hits: int
    misses: int
    maxsize: int | None
    currsize: int


_CACHES: dict[str, Any] = {"geometry.conv_geometry": cached_geometry}


def cached(maxsize: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Cache a function of hashable arguments; the least recently used value is dropped first."""

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        module = function.__module__.partition(".")[2]
        cache: Callable[..., Result] = lru_cache(maxsize)(function)
        register(f"{module}.{function.__name__}", cache)
        return cache

    return decorate


def register(name: str, cache: Any) -> None:
    """Add a cache, which has `cache_info` and `cache_clear`, to the list under a name."""
    _CACHES[name] = cache


def cache_info() -> dict[str, CacheInfo]:
    """Return the statistics of every cache, by the cached function's module and name.

    >>> from einconv_kfac.expressions import cache_info
    >>> cache_info()["geometry.conv_geometry"].maxsize
    4096
    """
    return {name: CacheInfo(*cache.cache_info()) for name, cache in _CACHES.items()}


def cache_clear() -> None:
    """Empty every cache."""
    for cache in _CACHES.values():
        cache.cache_clear()
