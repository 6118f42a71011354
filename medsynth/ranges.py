"""What a field of a config may be. It stands with the field, and all that lists or checks configs reads it there.

lr: float = number(1e-4, above=0)
betas: list[float] = numbers([0.9, 0.999], count=2, least=0, below=1)
loss: str = choice("l1", ("l1", "l2"))
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_KEY = "range"  # in a field's metadata


@dataclass(frozen=True)
class Range:
    """Finite numbers between bounds, or words; of a list or a mapping each of its values.

    `most` and `below` stand beside a lower bound.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    words: tuple[str, ...] = ()
    counts: tuple[int, int | None] | None = None
    """Of a list: how many it has, at least and at most."""
    optional: bool = False
    """Whether null is allowed."""

    def __str__(self) -> str:
        """For people: "> 0", "[0, 1)", "2 numbers in [0, 1)", "adamw, adam", "≥ 1 or null"."""
        text = ", ".join(self.words) or self._bounds()
        if self.counts is not None:
            text = self._several(*self.counts, text)
        return f"{text} or null" if self.optional else text

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value of the field's type, as the end of a sentence; None where nothing is."""
        if value is None and self.optional:
            return None
        if isinstance(value, dict):
            value = list(value.values())
        each = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        least, most = self.counts or (0, None)
        enough = len(each) >= least and (most is None or len(each) <= most)
        if enough and all(self._holds(one) for one in each):
            return None
        if self.words:
            return f" is not known; use one of {self}"
        text = f"in {self}" if str(self)[0] in "[(" else str(self)
        endless = any(isinstance(one, float) and not math.isfinite(one) for one in each)
        return f": must be finite, {text}" if endless and "finite" not in text else f": must be {text}"

    def _holds(self, value: Any) -> bool:
        if self.words:
            return value in self.words
        return (
            not isinstance(value, str | None)
            and math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    @staticmethod
    def _several(least: int, most: int | None, text: str) -> str:
        link = "in " if text[0] in "[(" else ""
        text = "finite numbers" if text == "finite" else f"numbers {link}{text}"
        if most is None:
            return f"{least} or more {text}" if least else text
        return f"{least} {text}" if most == least else f"{least} to {most} {text}"

    def _bounds(self) -> str:
        low = self.above if self.least is None else self.least
        high = self.below if self.most is None else self.most
        if low is None:
            return "finite"
        if high is None:
            return f"> {low}" if self.least is None else f"≥ {low}"
        return f"{'(' if self.least is None else '['}{low}, {high}{')' if self.most is None else ']'}"


def number(
    default: float | None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> Any:
    """A field of one number, finite and within the bounds; where the default is None, or with `optional`, null is
    allowed."""
    return _field(default, Range(least, above, most, below, optional=optional or default is None))


def numbers(
    default: list[Any] | dict[str, Any] | None,
    *,
    count: int | tuple[int, int | None] = (1, None),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a list, or of a mapping, whose every number is finite and within the bounds.

    count: how many there are, or the least and the most (None: any) of them.
    """
    counts = (count, count) if isinstance(count, int) else count
    return _field(default, Range(least, above, most, below, counts=counts, optional=default is None))


def choice(default: str | None, words: Sequence[str]) -> Any:
    """A field of one of `words`; where the default is None, null is allowed."""
    return _field(default, Range(words=tuple(words), optional=default is None))


def range_of(owner: type, name: str) -> Range | None:
    """The range of a field of a config dataclass; a subclass that gives a field another default keeps its range."""
    for base in owner.__mro__:
        own = vars(base).get("__dataclass_fields__", {}).get(name)
        if own is not None and _KEY in own.metadata:
            return own.metadata[_KEY]
    return None


def _field(default: Any, allowed: Range) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={_KEY: allowed})
    return field(default=default, metadata={_KEY: allowed})
