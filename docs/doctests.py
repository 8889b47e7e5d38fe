"""An extension of griffe: examples in docstrings become blocks of code in the reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> (?:.*\n?)(?:\1\S.*\n?)*", re.M)


def fenced(text: str) -> str:
    """Return a docstring with a fence around each example."""

    def fence(match: re.Match[str]) -> str:
        indent, block = match.group(1), match.group().rstrip("\n")
        return f"{indent}```pycon\n{block}\n{indent}```\n"

    return EXAMPLE.sub(fence, text)


class Doctests(griffe.Extension):
    """Fences examples, which stand outside of sections in this package."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring of an object after it was read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
