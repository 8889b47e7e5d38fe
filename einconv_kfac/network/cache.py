"""Bounded caches, all listed in one place."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from einconv_kfac import geometry

Result = TypeVar("Result")


class CacheInfo(NamedTuple):
    """How often a cache was hit and missed, its bound, and how many values it holds."""

    hits: int
    misses: int
    maxsize: int | None
    currsize: int


_CACHES: dict[str, Any] = {"geometry.convolution": geometry._convolution}


def cached(maxsize: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Cache a function of hashable arguments, least recently used values going first."""

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        module = function.__module__.partition(".")[2]
        cache: Callable[..., Result] = lru_cache(maxsize)(function)
        register(f"{module}.{function.__name__}", cache)
        return cache

    return decorate


def register(name: str, cache: Any) -> None:
    """List a cache that has `cache_info` and `cache_clear` under a name."""
    _CACHES[name] = cache


def cache_info() -> dict[str, CacheInfo]:
    """Return the statistics of every cache, by what it holds.

    >>> from einconv_kfac.expressions import cache_info
    >>> cache_info()["geometry.convolution"].maxsize
    4096
    """
    return {name: CacheInfo(*cache.cache_info()) for name, cache in _CACHES.items()}


def cache_clear() -> None:
    """Empty every cache."""
    for cache in _CACHES.values():
        cache.cache_clear()
