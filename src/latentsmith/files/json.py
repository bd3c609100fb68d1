"""Read JSON objects of any origin: of bounded size, and every way in which they can be bad is one BadInput."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from .errors import BadInput
from .regular import JSON, SizeLimit, read_regular


def read_json(path: str | Path, what: str, *, limit: SizeLimit = JSON) -> dict[str, Any]:
    """Return the JSON object in a file.

    what: what the file should be, with its article, for messages ("the state of a checkpoint").
    Raises BadInput, which names the file, if it is missing, unreadable, larger than `limit` or no JSON object.
    """
    try:
        data = read_regular(path, limit)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; {what} was expected") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); {what} was expected") from None
    return parse_json(data, path, what)


def parse_json(data: str | bytes, name: str | Path, what: str) -> dict[str, Any]:
    """Return the JSON object that a text holds. name: where it comes from, for messages. Otherwise as `read_json`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: bad syntax, bad UTF-8, a number of 5,000 digits
        raise BadInput(f"{name}: is not {what}: not JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{name}: is not {what}: it holds a {type(value).__name__}, a JSON object was expected")
    return value


def check_types(table: Any, types: Mapping[str, type | UnionType], name: str | Path, what: str) -> None:
    """Raise BadInput unless `table` is a JSON object whose values have these types. Numbers are 0 or more.

    types: key -> type; one that allows None need not be there. name, what: as in `read_json`.
    """
    if not isinstance(table, dict):
        raise BadInput(f"{name}: is not {what}: {str(table)[:40]!r} stands where a JSON object was expected")
    for key, expected in types.items():
        value = table.get(key)
        is_flag = isinstance(value, bool) and expected is not bool
        if is_flag or not isinstance(value, expected) or (isinstance(value, int | float) and not 0 <= value < 2**62):
            raise BadInput(f"{name}: is not {what}: {key} is {str(value)[:40]!r}")
