"""Every image is opened by `latentsmith.files.images`: a fixed list of formats, and no program is ever started."""

import ast
import io
import json
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, UnidentifiedImageError

from latentsmith.cli import main
from latentsmith.data.errors import BadSample
from latentsmith.data.image_sizes import image_sizes
from latentsmith.data.images import decode_image
from latentsmith.data.ingest import import_dataset
from latentsmith.data.shards import ShardSet, ShardWriter
from latentsmith.files import images
from latentsmith.files.errors import BadInput
from latentsmith.files.images import BadImage, formats_taken, open_image, read_image
from latentsmith.files.regular import SizeLimit
from latentsmith.inference.png import read_metadata

ROOT = Path(__file__).parents[1]
ONLY = ROOT / "src" / "latentsmith" / "files" / "images.py"
SOURCES = [path for folder in ("src", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
OPENERS = {  # what opens any format, or starts a program
    "PIL.Image.open",
    "PIL.ImageFile.Parser",
    "PIL.ImageGrab",
    "PIL.ImageShow",
    "PIL.EpsImagePlugin",
    "PIL.WmfImagePlugin",
    "imageio",
    "cv2",
    "skimage",
    "torchvision",
}
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
HEADER = struct.pack("<4s6IH2x", b"\xc5\xd0\xd3\xc6", 32, len(POSTSCRIPT), 0, 0, 0, 0, 0xFFFF)
FILES = {"text": POSTSCRIPT, "binary": HEADER + POSTSCRIPT, "printer": b"\x04" + POSTSCRIPT}


def image_bytes(format="PNG", size=(16, 16), **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def full_names(tree):
    """Full names of the modules and attributes that a module uses through its imports."""
    aliases, names = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            aliases |= {alias.asname or alias.name.split(".")[0]: alias.asname and alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            names.add(".".join([aliases.get(first) or first, *rest]))
    return names


def openers(tree):
    names = full_names(tree)
    return {opener for opener in OPENERS if any(f"{name}.".startswith(f"{opener}.") for name in names)}


def test_only_one_file_calls_image_open():
    assert len(SOURCES) > 150
    assert openers(ast.parse(ONLY.read_text())) == {"PIL.Image.open"}
    for path in SOURCES:
        if path != ONLY:
            assert not openers(ast.parse(path.read_text())), f"{path}: use latentsmith.files.images.open_image"


@pytest.mark.parametrize(
    "source",
    [
        "from PIL import Image\ndef f(path):\n    with Image.open(path) as image: ...",
        "from PIL import Image as Img\nf = Img.open",
        "import PIL.Image\nPIL.Image.open('a')",
        "import PIL.Image as I\nI.open('a')",
        "from PIL.Image import open as o",
    ],
)
def test_the_reader_of_calls_sees_them(source):
    assert openers(ast.parse(source)) == {"PIL.Image.open"}


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that the `gs` first on PATH writes when it is started."""
    path, folder = tmp_path / "gs-ran", tmp_path / "programs"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\necho ran > '{path}'\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow remembers whether it has found one
    return path


@pytest.fixture(params=FILES)
def postscript(request, tmp_path):
    """A folder that holds a.jpg, which is PostScript, and its caption."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(FILES[request.param])
    (folder / "a.txt").write_text("a caption")
    return folder / "a.jpg"


def test_pillow_alone_starts_the_program(marker, tmp_path):
    """Shows that the other tests would see it."""
    (tmp_path / "a.jpg").write_bytes(POSTSCRIPT)
    with pytest.raises((OSError, UnidentifiedImageError)), Image.open(tmp_path / "a.jpg") as image:
        image.load()
    assert marker.exists()


def test_opening_names_the_format_and_those_taken(marker, postscript):
    for opener in (open_image, read_image, read_metadata):
        with pytest.raises(
            BadImage, match=r"^\S+/a\.jpg: .*the format is PostScript; convert it to one of JPEG, "
        ) as error:
            opener(postscript)
        assert error.value.reason == "unsupported format" and "\n" not in str(error.value)
    assert not marker.exists()


def test_import_sets_it_aside(marker, postscript, tmp_path):
    (postscript.parent / "b.png").write_bytes(image_bytes())
    (postscript.parent / "b.txt").write_text("a good one")
    report = import_dataset(postscript.parent, tmp_path / "shards")
    assert (report.good, report.reasons) == (1, {"unsupported format": 1})
    (entry,) = json.loads(report.path.read_text())["samples"]
    assert "a" in entry["name"] and "PostScript" in entry["detail"]
    assert not marker.exists()


def test_import_that_stops_at_it_is_one_line(marker, postscript, tmp_path, capsys):
    assert main(["data", "import", str(postscript.parent), str(tmp_path / "shards"), "--max-bad", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.jpg" in line and "PostScript" in line
    assert not marker.exists()


@pytest.mark.parametrize("format", FILES)
def test_member_of_a_set(marker, tmp_path, format):
    with pytest.raises(BadSample, match="PostScript") as error:
        decode_image(FILES[format])
    assert error.value.reason == "unsupported format"
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write("a", {"jpg": FILES[format], "txt": b"x"})
    with pytest.raises(BadInput, match=r"shard-000000\.tar: sample 'a': no image \(the format is PostScript"):
        image_sizes(ShardSet(tmp_path / "shards"))
    assert not marker.exists()


@pytest.mark.parametrize("flag", ["--image", "--mask", "--again"])
def test_generate(marker, postscript, tmp_path, capsys, flag):
    arguments = [
        "generate",
        "--from",
        str(tmp_path / "no-model"),
        "--out",
        str(tmp_path / "out"),
        flag,
        str(postscript),
    ]
    assert main([*arguments, *([] if flag == "--again" else ["a prompt"])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{postscript}: cannot be read as an image (the format is PostScript" in line
    assert not marker.exists()


@pytest.mark.parametrize("format", ["JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_formats_that_are_taken(format, tmp_path):
    if format not in (*formats_taken(), "MPO"):
        pytest.skip(f"this Pillow has no {format}")
    more = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]} if format == "MPO" else {}
    data = image_bytes(format, **more)
    (tmp_path / "image.bin").write_bytes(data)
    for image in (open_image(data), open_image(memoryview(data)), read_image(tmp_path / "image.bin")):
        assert image.format == format and image.convert("RGB").size == (16, 16)


@pytest.mark.parametrize("format", ["PDF", "ICO", "DDS", "QOI"])
def test_formats_that_are_not(format):
    with pytest.raises(BadImage, match=f"the format is {format}; "):
        open_image(image_bytes(format))


@pytest.mark.parametrize("format", ["TGA", "PCX", "SGI", "IM", "SPIDER"])
def test_formats_without_a_name_are_no_images(format):
    buffer = io.BytesIO()
    Image.new("F" if format == "SPIDER" else "RGB", (16, 16)).save(buffer, format)
    with pytest.raises(BadImage, match="not an image in a known format"):
        open_image(buffer.getvalue())


def test_heif_needs_its_plugin(monkeypatch):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40
    with pytest.raises(BadImage, match="the format is HEIF"):
        open_image(heic)
    monkeypatch.setitem(Image.OPEN, "HEIF", (lambda file, name: Image.new("RGB", (3, 4)), lambda head: b"heic" in head))
    assert "HEIF" in formats_taken() and open_image(heic).size == (3, 4)


@pytest.mark.parametrize("name", ["fifo", "folder", "/dev/zero", "missing", "nul\0"])
def test_what_is_no_regular_file(tmp_path, name):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    errors = []

    def run():
        try:
            open_image(tmp_path / name)
        except BadImage as error:
            errors.append(str(error))

    thread = threading.Thread(target=run, daemon=True)  # a FIFO that is opened waits for a writer
    thread.start()
    thread.join(600)
    assert errors and errors[0].startswith(f"{tmp_path / name}: ")


def test_fifo_put_in_a_files_place(tmp_path, monkeypatch):
    """The file is changed after os.stat: opening does not wait, and the second look refuses it."""
    (tmp_path / "a.png").write_bytes(image_bytes())
    status = os.stat(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    monkeypatch.setattr(os, "stat", lambda path: status)
    with pytest.raises(BadImage, match=r"a\.png: is a FIFO"):
        open_image(tmp_path / "a.png")


def test_limits(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(image_bytes())
    with pytest.raises(BadImage, match=r"a\.png: .*16x16 is more than 255 pixels"):
        open_image(path, max_pixels=255)
    monkeypatch.setattr(images, "IMAGE", SizeLimit("an image", 100))
    for source in (path, path.read_bytes()):
        with pytest.raises(BadImage, match="more than the 100 allowed") as error:
            open_image(source)
        assert error.value.reason == "too many bytes"


def test_damage_is_one_line_that_names_the_file(tmp_path):
    for format in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        data = image_bytes(format, size=(64, 64))
        for part in (0.0, 0.1, 0.5, 0.9):
            (tmp_path / "a.jpg").write_bytes(data[: int(len(data) * part)])
            with pytest.raises(BadImage, match=r"^\S+/a\.jpg: cannot be read as an image \(.*\)$"):
                read_image(tmp_path / "a.jpg")
