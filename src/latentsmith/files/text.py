"""Read text as people save it: UTF-8, or UTF-16 and UTF-32 with a byte order mark; any line ends.

Other encodings are refused and never guessed: a wrong guess is a wrong caption without a word.
"""

import codecs
import os
import unicodedata

from .errors import BadInput
from .regular import SizeLimit, read_regular

BYTE_ORDER_MARKS = {  # UTF-32's begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_ADVICE = "a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned"
ZERO_WIDTH = "\u200b\u2060\ufeff"
WHITE = "".join(char for char in map(chr, range(0x3001)) if char.isspace()) + ZERO_WIDTH
UNSEEN = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that fonts show as nothing


class NotText(BadInput):
    """Bytes that are not text in an encoding that is read."""


def encoding_of(head: bytes) -> str:
    """Return the encoding of a text by its first bytes, named so that Python drops the byte order mark."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8-sig")


def decode_text(data: bytes, name: str | os.PathLike[str]) -> str:
    """Return bytes as text with line ends of "\\n". name: what they are, for errors. Raises NotText."""
    if data.startswith(LFS_POINTER):
        raise NotText(f"{name}: {LFS_ADVICE}")
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding, "surrogateescape")
    except UnicodeDecodeError as error:
        raise NotText(f"{name}: not {encoding.upper()} text at byte {error.start:,}; save it as UTF-8") from None
    return checked_text(text, name)


def checked_text(text: str, name: str | os.PathLike[str]) -> str:
    """Return a text that was decoded with "surrogateescape", its line ends "\\n". Raises NotText for other bytes."""
    bad = next((at for at, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
    if bad is None:
        return text.replace("\r\n", "\n").replace("\r", "\n")
    code = ord(text[bad])
    what = f"byte 0x{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else "half of a surrogate pair"
    before = trimmed(text[max(0, bad - 20) : bad].split("\n")[-1])
    where = f' after "{before}"' if before else ""
    raise NotText(f"{name}: not UTF-8 text ({what}{where}); save it as UTF-8")


def read_lines(path: str | os.PathLike[str], limit: SizeLimit) -> list[str]:
    """Return the lines of a text file that show something, trimmed. Raises NotText, OSError and as `read_regular`."""
    lines = map(trimmed, decode_text(read_regular(path, limit), path).split("\n"))
    return [line for line in lines if is_visible(line)]


def trimmed(text: str) -> str:
    """Return a text without white space and zero-width characters at its ends."""
    return text.strip(WHITE)


def is_visible(text: str) -> bool:
    """Return whether a text shows anything: a letter, number, punctuation mark or symbol."""
    return any(unicodedata.category(char)[0] in "LNPS" and char not in UNSEEN for char in text)
