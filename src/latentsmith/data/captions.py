"""Change captions as a run reads them: prompts, prefixes, wildcards, shuffled and dropped tags.

All that is random is a function of the seed, so of the run's seed and the sample's position.
"""

import re
from dataclasses import dataclass

from .shuffle import integer_below, shuffled_index

CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")
SHUFFLE, DROP, CHOOSE = 1, 2, 3  # random streams of a caption; the last one's go on from its number


@dataclass(frozen=True)
class CaptionRules:
    """What is done to a caption, in this order.

    prompt: in place of the caption. prefix, suffix: joined to it by a space. wildcards: one of the lines of a caption,
    and one of the choices of each {a|b}. shuffle_tags, keep_tags: put its tags, but the first so many, into a random
    order. tag_dropout: chance of each of those to be left out. separator: between tags.
    """

    prompt: str | None = None
    prefix: str = ""
    suffix: str = ""
    wildcards: bool = False
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_dropout: float = 0.0
    separator: str = ","

    def __call__(self, caption: str, seed: int) -> str:
        """Return the caption to train on. seed: 64 bits, of the sample at its position."""
        text = caption if self.prompt is None else self.prompt
        text = " ".join(part for part in (self.prefix, text, self.suffix) if part)
        if self.wildcards:
            text = chosen(text, seed)
        return self._tags(text, seed) if self.shuffle_tags or self.tag_dropout else text

    @property
    def unchanging(self) -> "CaptionRules":
        """Return the rules without what is random, for validation: wildcards take what the sample's number gives."""
        return CaptionRules(self.prompt, self.prefix, self.suffix, self.wildcards)

    def _tags(self, text: str, seed: int) -> str:
        tags = [tag.strip() for tag in text.split(self.separator)]
        kept, others = tags[: self.keep_tags], tags[self.keep_tags :]
        if self.shuffle_tags:
            key = integer_below(1 << 62, seed, SHUFFLE)
            others = [others[shuffled_index(key, number, len(others))] for number in range(len(others))]
        if self.tag_dropout:
            key = integer_below(1 << 62, seed, DROP)
            limit = round(self.tag_dropout * 2**53)
            others = [tag for number, tag in enumerate(others) if integer_below(2**53, key, number) >= limit]
        return f"{self.separator} ".join([*kept, *others])


def chosen(text: str, seed: int) -> str:
    """Return one line of a text, with one of the alternatives of each {a|b|} in it; these cannot be nested."""
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    line = lines[integer_below(len(lines), seed, CHOOSE)].strip()
    numbers = iter(range(CHOOSE + 1, CHOOSE + 2 + line.count("{")))

    def pick(match: re.Match[str]) -> str:
        choices = match[1].split("|")
        return choices[integer_below(len(choices), seed, next(numbers))]

    return CHOICE.sub(pick, line)
