"""The table of every key that a config may have: our options, and those of NeMo's and LDM's files.

Status of a key:
    used       an option of ours
    mapped     a key of NeMo's or LDM's, read as an option of ours
    no effect  accepted, since shipped YAML files carry it; changes nothing, for the reason given
    refused    accepted at its default only; anything else is an error, for the reason given
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

from latentsmith.files.errors import BadInput
from latentsmith.image_request import descriptions

from .foreign_keys import IGNORED, MOVED, REFUSED
from .inference_options import InferenceConfig
from .option import OptionField
from .run_options import Config
from .value_types import ValueType, anything

Status = Literal["used", "mapped", "no effect", "refused"]


@dataclass(frozen=True)
class Option:
    """One key. aliases: what people call it elsewhere. filled: whether its default is written into a config."""

    key: str
    value_type: ValueType
    default: Any
    meaning: str
    status: Status = "used"
    aliases: tuple[str, ...] = ()
    filled: bool = False

    @property
    def leaf(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.key.rpartition(".")[0]

    def read(self, value: Any, source: str) -> Any:
        """Return the value as a run uses it. Raises BadInput for a wrong type or range, or a refused value."""
        if value is None and self.value_type.nullable:
            return None
        try:
            result = self.value_type.read(value)
        except (ValueError, TypeError, OverflowError):
            raise BadInput(f"{source}: {self.key} must be {self.value_type.description}, not {value!r}") from None
        if self.status == "refused" and result != self.default:
            default = json.dumps(self.default)
            raise BadInput(f"{source}: {self.key}={result} is refused: {self.meaning}; leave it at {default}")
        return result


@cache
def table() -> dict[str, Option]:
    """Return every key, ours first, in the order of the docs."""
    found = [*_options(Config), *_options(InferenceConfig)]
    found += [Option(key, type_, None, meaning, "mapped") for key, (type_, meaning) in MOVED.items()]
    found += [Option(key, anything(), None, reason, "no effect") for key, reason in IGNORED.items()]
    found += [Option(key, anything(), default, reason, "refused") for key, (default, reason) in REFUSED.items()]
    options: dict[str, Option] = {}
    for option in found:
        options.setdefault(option.key, option)  # trainer.precision is also in an inference file
    return options


def _options(section: type, prefix: str = "") -> Iterator[Option]:
    """Yield the options of a section and of those inside it, its own first."""
    hints, given_only = get_type_hints(section), getattr(section, "given_only", False)
    described: dict[str, OptionField] = descriptions(section)
    for name, found in described.items():
        type_ = found.value_type(_without_none(hints[name]) if given_only else hints[name])
        yield Option(
            f"{prefix}{name}", type_, found.default, found.meaning, aliases=found.aliases, filled=not given_only
        )
    for name, hint in hints.items():
        if subsection := section_of(hint):
            yield from _options(subsection, f"{prefix}{name}.")


def section_of(annotation: Any) -> type | None:
    """Return the section that a field holds, None for an option."""
    return next((part for part in (annotation, *get_args(annotation)) if is_dataclass(part)), None)  # type: ignore[return-value]


def _without_none(annotation: Any) -> Any:
    """Return `X` of `X | None`: where nothing has a default, None is how absence is written."""
    kept = tuple(part for part in get_args(annotation) if part is not type(None))
    if not kept or type(None) not in get_args(annotation):
        return annotation
    union = kept[0]
    for part in kept[1:]:
        union = union | part
    return union


@cache
def groups() -> frozenset[str]:
    """Return every inner node: "model", "model.optim", ..."""
    parts = [key.split(".") for key in table()]
    return frozenset(".".join(part[:depth]) for part in parts for depth in range(1, len(part)))


def find(key: str) -> Option | None:
    """Return the option that `key` belongs to: its own, or the free mapping it lies in; None if there is neither."""
    options = table()
    if key in options:
        return options[key]
    while key := key.rpartition(".")[0]:
        if key in options:
            return options[key] if options[key].value_type.free else None
    return None


def unknown_key(key: str, source: str) -> BadInput:
    """Return the error for a key that is not in the table."""
    if above := next((option for option in table().values() if key.startswith(f"{option.key}.")), None):
        return BadInput(f"{source}: {above.key} must be {above.value_type.description}, not a mapping")
    hint = nearest(key)
    advice = f"did you mean {hint}?" if hint else "`latentsmith config explain` lists every option"
    return BadInput(f"{source}: {key} is not an option; {advice}")


def nearest(key: str) -> str | None:
    """Return the key of the table most like this one in name and section; None where no name is like it."""
    parent, _, leaf = key.rpartition(".")

    def name_likeness(option: Option) -> float:
        elsewhere = max((_likeness(leaf.lower(), name) for name in option.aliases), default=0.0)
        return max(_likeness(leaf.lower(), option.leaf.lower()), 0.9 * elsewhere)

    alike = [(name_likeness(option), option) for option in table().values()]
    candidates = {option.key: name + 0.5 * _likeness(parent, option.parent) for name, option in alike if name >= 0.6}
    return max(candidates, key=candidates.__getitem__, default=None)


def named(word: str) -> Option | None:
    """Return the one option that `word` names by an alias or by the last part of its key, or None."""
    used = [option for option in table().values() if option.status == "used"]
    by_alias = [option for option in used if word in option.aliases]
    found = by_alias or [option for option in used if word == option.leaf]
    return found[0] if len(found) == 1 else None


def _likeness(first: str, second: str) -> float:
    return SequenceMatcher(None, first, second).ratio()
