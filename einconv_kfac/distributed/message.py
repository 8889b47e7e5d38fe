"""The one form of all small messages: numbers that are added up over workers.

Since all of them have the same length, a worker that fails can send its error in place of
whatever the others send next, and no worker waits for a message that never comes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

LENGTH = 128
"""Numbers of a message, in float64."""
HEADER = 12
PAYLOAD = 52
"""Numbers that one message carries; more are sent in several messages."""
_BYTES = 6
"""Bytes of text per number, so that it is an integer below ``2^53``."""
_TEXT = HEADER + PAYLOAD
_WORDS, _WORD_BITS = 3, 20
"""A digest consists of 3 words of 20 bits. The sum of their squares over up to 8,192 workers is
an integer below ``2^53``, and ``N sum d^2 = (sum d)^2`` holds if and only if all are the same."""


def header(question: str, same: Mapping[str, object], begun: int) -> list[float]:
    """Return the first numbers of a message.

    Args:
        question: What is asked.
        same: What must be the same on all workers.
        begun: The number of messages that were begun early.
    """
    level = begun & ((1 << _WORD_BITS) - 1)
    words = [*_digest(question)[:1], level, *_digest(repr(sorted(same.items())))]
    return [0.0, 0.0, *(float(number) for word in words for number in (word, word * word))]


def failure(rank: int, error: BaseException) -> list[float]:
    """Return the message of a worker that failed."""
    text = f"{type(error).__name__}: {error}".encode()[: _BYTES * (LENGTH - _TEXT)]
    words = [text[i : i + _BYTES] for i in range(0, len(text), _BYTES)]
    numbers = [float(int.from_bytes(word, "little")) for word in words]
    numbers += [0.0] * (LENGTH - _TEXT - len(numbers))
    return [1.0, float(rank), *[0.0] * (_TEXT - 2), *numbers]


@dataclass(frozen=True)
class Answer:
    """A message that was added up over workers.

    Args:
        numbers: Its numbers.
        size: The number of workers.
    """

    numbers: Sequence[float]
    size: int

    @property
    def failed(self) -> int:
        """The number of workers that failed."""
        return round(self.numbers[0])

    def reason(self) -> str:
        """Return which worker failed, and how."""
        if self.failed > 1:
            return f"got errors on {self.failed} of {self.size} workers"
        words = [round(number).to_bytes(_BYTES, "little") for number in self.numbers[_TEXT:]]
        text = b"".join(words).rstrip(b"\0").decode(errors="ignore")
        return f"got an error on worker {round(self.numbers[1])} of {self.size}, {text}"

    def asked(self, question: str) -> bool:
        """Return whether all workers that did not fail asked a question."""
        others = self.size - self.failed
        return round(self.numbers[2]) == others * _digest(question)[0]

    @property
    def is_common(self) -> bool:
        """Whether all workers asked the same question."""
        return next(self._are_equal())

    @property
    def is_level(self) -> bool:
        """Whether all workers have begun as many messages early."""
        return next(itertools.islice(self._are_equal(), 1, None))

    @property
    def is_same(self) -> bool:
        """Whether what must be the same is the same on all workers."""
        return all(itertools.islice(self._are_equal(), 2, None))

    def _are_equal(self) -> Iterator[bool]:
        """Yield whether each word is the same on all workers."""
        for index in range(2, HEADER, 2):
            total, squares = round(self.numbers[index]), round(self.numbers[index + 1])
            yield self.size * squares == total * total


def _digest(text: str) -> list[int]:
    """Return the words of a text's digest."""
    whole = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return [whole >> (_WORD_BITS * i) & ((1 << _WORD_BITS) - 1) for i in range(_WORDS)]
