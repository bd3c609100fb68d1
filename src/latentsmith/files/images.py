"""Open image files with Pillow: a fixed list of formats, no external program, limits on bytes and pixels.

Pillow picks its decoder by a file's content, whatever its name, and the one for PostScript starts the program `gs` of
PATH. Nothing else in the package may call `Image.open`.
"""

import io
import os
from contextlib import suppress
from importlib import import_module

from PIL import Image

from .errors import BadInput
from .regular import IMAGE, NotRegular, TooLarge, read_regular
from .text import LFS_ADVICE, LFS_POINTER

# Decoded inside this process by Pillow's own C code or the libraries it is built with; none starts a program or opens
# another file. The JPEG decoder reads MPO too. AVIF needs a Pillow that has it, HEIF a plugin that the caller has
# registered (pillow-heif); either is left out where it is missing. Never add EPS (starts gs) or WMF (asks the system).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "HEIF")
PLUGINS = ("Jpeg", "Mpo", "Png", "WebP", "Gif", "Bmp", "Tiff", "Avif", "Jpeg2K", "Ppm")  # HEIF's is not Pillow's
for _plugin in PLUGINS:  # by name, because Image.init() would import the plugins of all formats
    with suppress(ImportError):
        import_module(f"PIL.{_plugin}ImagePlugin")

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: a quarter of a GiB as RGB
OTHER_FORMATS = {  # first bytes of files that people do rename to .jpg, or that Pillow would open if it were let
    b"%!PS": "PostScript",
    b"\x04%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",  # EPS with a preview
    b"%PDF": "PDF",
    b"\xd7\xcd\xc6\x9a": "WMF",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "OLE (FlashPix, MIC)",
    b"8BPS": "Photoshop (PSD)",
    b"gimp xcf": "GIMP (XCF)",
    b"<svg": "SVG",
    b"\x00\x00\x01\x00": "ICO",
    b"icns": "ICNS",
    b"DDS ": "DDS",
    b"qoif": "QOI",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"SIMPLE  =": "FITS",
    b"<!DOCTYPE html": "HTML, a page in place of a download",
    b"<!doctype html": "HTML, a page in place of a download",
    b"<html": "HTML, a page in place of a download",
}
SIGNATURES = (  # first bytes of the formats taken, where they are long enough to be no accident
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n",
    b"\xff\x4f\xff\x51",
)
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
HEAD = 64  # bytes; holds the signatures above, EMF's at byte 40 and the brands of AVIF


class BadImage(BadInput):
    """An image that cannot be opened. reason: a few words to count by; the message has the details.

    Reasons: "zero bytes", "not an image", "unsupported format", "truncated", "corrupt", "too many pixels",
    "too many bytes", "unreadable file", "Git LFS pointer".
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def open_image(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return the image in a file or in bytes, its header read and its pixels not yet decoded.

    source: path of a regular file (a FIFO, device or folder is refused unopened), or the bytes of one.
    Raises BadImage; the message names the path if `source` is one.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _open_bytes(source, max_pixels)
    try:
        data = read_regular(source, IMAGE)
    except NotRegular as error:
        raise BadImage("unreadable file", str(error)) from None
    except TooLarge as error:
        raise BadImage("too many bytes", str(error)) from None
    except (OSError, ValueError) as error:  # ValueError for a path with a null character
        raise _naming(source, "unreadable file", getattr(error, "strerror", None) or error) from None
    try:
        return _open_bytes(data, max_pixels)
    except BadImage as error:
        raise _naming(source, error.reason, error) from None


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image in a file, its pixels decoded. Raises BadImage, which names the path."""
    image = open_image(path, max_pixels=max_pixels)
    try:
        image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more for a damaged file
        raise _naming(path, "truncated" if "truncated" in str(error).lower() else "corrupt", error) from None
    return image


def formats_taken() -> tuple[str, ...]:
    """Return the FORMATS that are registered. `Image.open` raises KeyError for one that is not."""
    return tuple(name for name in FORMATS if name in Image.OPEN)


def other_format(data: bytes | bytearray | memoryview) -> str | None:
    """Return the name of a known format that is not taken, from the first bytes of a file, or None."""
    head = bytes(data[:HEAD])
    if head[4:8] == b"ftyp":
        is_avif = b"avif" in head or b"avis" in head  # the first brand of an AVIF file may be mif1
        name = "AVIF" if is_avif else "HEIF" if head[8:12] in HEIF_BRANDS else None
        return None if name in Image.OPEN else name
    if head[:4] == b"\x01\x00\x00\x00" and head[40:44] == b" EMF":
        return "EMF"
    return next((name for magic, name in OTHER_FORMATS.items() if head.startswith(magic)), None)


def is_image(data: bytes | bytearray | memoryview) -> bool:
    """Return whether a file is an image by its first HEAD bytes, in a format that is taken or another."""
    head = bytes(data[:HEAD])
    is_webp, is_heif = head[:4] == b"RIFF" and head[8:12] == b"WEBP", head[4:8] == b"ftyp" and b"avif" in head
    is_bitmap = head[:2] == b"BM" and head[6:10] == b"\0" * 4
    return head.startswith(SIGNATURES) or is_webp or is_heif or is_bitmap or other_format(head) is not None


def is_cut_short(data: bytes | bytearray | memoryview) -> bool:
    """Return whether a WebP file announces more bytes than there are; its decoder gives no reason."""
    head = bytes(data[:12])
    return head[:4] == b"RIFF" and head[8:] == b"WEBP" and int.from_bytes(head[4:8], "little") + 8 > len(data)


def _open_bytes(data: bytes | bytearray | memoryview, max_pixels: int) -> Image.Image:
    size = len(data)
    if not size:
        raise BadImage("zero bytes", "the image file is empty (0 bytes)")
    if size > IMAGE.size:
        raise BadImage("too many bytes", f"the image file has {size:,} bytes, more than the {IMAGE.size:,} allowed")
    if bytes(data[: len(LFS_POINTER)]) == LFS_POINTER:
        raise BadImage("Git LFS pointer", LFS_ADVICE)
    if found := other_format(data):
        taken = ", ".join(formats_taken())
        raise BadImage("unsupported format", f"the format is {found}; convert it to one of {taken}")
    try:
        image = Image.open(io.BytesIO(data), formats=formats_taken())
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels", f"the image has more than {max_pixels:,} pixels ({error})") from None
    except Exception as error:  # as in read_image
        reason = "truncated" if is_cut_short(data) else "not an image"
        detail = "the data are not an image in a known format" if reason == "not an image" else "the image is truncated"
        raise BadImage(reason, f"{detail} ({size:,} bytes; {type(error).__name__})") from None
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage("too many pixels", f"the image of {width}x{height} is more than {max_pixels:,} pixels")
    return image


def _naming(path: str | os.PathLike[str], reason: str, error: Exception | str) -> BadImage:
    detail = " ".join(str(error).split())  # a decoder's message may have several lines
    return BadImage(reason, f"{os.fspath(path)}: cannot be read as an image ({detail})")
