"""Standard output and error of a command: text that cannot be shown never ends the work."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from typing import Any, TextIO

RESULT_IS_TEXT = ("inspect", "config", "-h", "--help", "--version")  # what cannot be written is then a failure


class BestEffort:
    """A text stream that drops what its disk has no room for, or what its reader has gone from."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def protect_streams(command: str) -> None:
    """Let no message of a command end it: a character that the terminal's encoding lacks, a full disk, a closed pipe.

    command: the first word of the command line. Where its result is text, standard output keeps its errors.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    streams: Any = sys
    streams.stderr = BestEffort(sys.stderr)
    if command not in RESULT_IS_TEXT:
        streams.stdout = BestEffort(sys.stdout)
