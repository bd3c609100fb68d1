"""Leave samples out of an import on purpose, by the size of an image, the length of a caption, other columns."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from latentsmith.files.errors import BadInput

from .errors import BadSample

MAX_ASPECT = 20.0
CONDITION = re.compile(r"(?P<key>[^<>=!]+)(?P<sign><=|>=|!=|<|>|=)(?P<value>.*)", re.DOTALL)
SIGNS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


@dataclass(frozen=True)
class Filters:
    """Selection of samples by an import; one that is left out counts under the name of its filter.

    min_size, max_size: pixels of the shorter side. max_aspect: of the longer over the shorter side, MAX_ASPECT where
    it is not given: of a strip 4,000 times as long as it is wide a crop shows nothing. min_caption,
    max_caption: characters. where: conditions on the sample's JSON or columns, such as "aesthetic_score>=5" and
    "language=en"; a sample without the key does not meet one.
    """

    min_size: int = 1
    max_size: int | None = None
    max_aspect: float | None = None
    min_caption: int = 1
    max_caption: int | None = None
    where: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_aspect is not None and not 1 <= self.max_aspect < inf:  # nan is neither
            raise BadInput(f"max_aspect {self.max_aspect} is not a number of at least 1")
        for condition in self.where:
            parsed(condition)

    def check(self, size: tuple[int, int], caption: str | None, columns: Mapping[str, Any]) -> None:
        """Raise BadSample, its reason the first filter that leaves the sample out. size: (width, height)."""
        short, long = min(size), max(size)
        if short < self.min_size:
            raise BadSample("too small", f"{size[0]}x{size[1]}: the shorter side is under {self.min_size} pixels")
        if self.max_size is not None and short > self.max_size:
            raise BadSample("too large", f"{size[0]}x{size[1]}: the shorter side is over {self.max_size} pixels")
        aspect = self.max_aspect or MAX_ASPECT
        if long > aspect * short:
            raise BadSample("too elongated", f"{size[0]}x{size[1]}: the sides differ by more than {aspect:g} times")
        if caption is not None and len(caption) < self.min_caption:
            raise BadSample("caption too short", f"{len(caption)} characters, under {self.min_caption}")
        if caption is not None and self.max_caption is not None and len(caption) > self.max_caption:
            raise BadSample("caption too long", f"{len(caption):,} characters, over {self.max_caption:,}")
        for condition in self.where:
            key, sign, value = parsed(condition)
            if not _meets(columns.get(key), sign, value):
                raise BadSample(f"not {condition}", f"{key} is {columns.get(key, 'not there')!r}")


def parsed(condition: str) -> tuple[str, str, str]:
    """Return (key, sign, value) of a condition; BadInput for what is none."""
    match = CONDITION.fullmatch(condition)
    if match is None:
        raise BadInput(f"{condition!r} is no condition; write KEY=VALUE, KEY>=NUMBER, or with <=, <, > or !=")
    return match["key"].strip(), match["sign"], match["value"].strip()


def _meets(held: Any, sign: str, wanted: str) -> bool:
    """Compare numbers as numbers, also where a table holds them as text; all else as text, for equality only."""
    if held is None:
        return False
    try:
        return SIGNS[sign](float(held), float(wanted))
    except (TypeError, ValueError):
        return sign in ("=", "!=") and SIGNS[sign](str(held), wanted)
