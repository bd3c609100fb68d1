"""Draw a sheet of images under their prompts: captions the model was trained on, and combinations it never saw.

    python grid.py RUN OUT.png [--count 24] [--steps 30] [--guidance-scale 4] [--seed 0]

RUN is whatever `latentsmith.Pipeline.from_pretrained` opens: the folder of a run, an exported checkpoint.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import latentsmith
from latentsmith.files.atomic import write_bytes
from latentsmith.files.errors import BadInput
from latentsmith.inference.sheets import labelled_sheet

TRAINED = [
    "grinning face",
    "smiling face with heart-eyes",
    "smiling face with sunglasses",
    "angry face",
    "cat face",
    "dog face",
    "panda",
    "octopus",
    "red apple",
    "green apple",
    "red heart",
    "purple heart",
    "blue circle",
    "orange square",
    "flag of france",
    "flag of japan",
    "woman firefighter, medium skin tone",
    "man astronaut, dark skin tone",
    "thumbs up, light skin tone",
    "person with curly hair",
    "house",
    "automobile",
    "musical note",
    "three o'clock",
]
UNSEEN = [
    "angry face with sunglasses",
    "grinning face with heart-eyes",
    "blue face",
    "cat face with sunglasses",
    "dog with heart-eyes",
    "angry panda",
    "pink octopus",
    "purple apple",
    "blue apple",
    "yellow apple",
    "two red hearts",
    "heart on fire with arrow",
    "black and white circle",
    "pink square",
    "flag of france and italy",
    "green flag",
    "woman firefighter with red hair",
    "bald astronaut, dark skin tone",
    "two thumbs up",
    "robot with curly hair",
    "green house",
    "blue automobile",
    "red musical note",
    "thirteen o'clock",
]
HEADINGS = "Captions from the training set", "Captions it has never seen"
COLUMNS, ZOOM = 4, 2
HEADING_HEIGHT, GAP = 26, 20
MOST_BYTES = 500_000

Generate = Callable[[Sequence[str]], list[Image.Image]]


def sheet(generate: Generate, halves: Sequence[Sequence[str]]) -> Image.Image:
    """Each list of prompts as a labelled sheet under its heading, side by side.

    generate: prompts to images of one size, in the same order.
    """
    sheets = [
        labelled_sheet(
            [(np.asarray(image), prompt, False) for image, prompt in zip(generate(prompts), prompts, strict=True)],
            columns=COLUMNS,
            zoom=ZOOM,
        )
        for prompts in halves
    ]
    width = sum(half.width for half in sheets) + GAP * (len(sheets) - 1)
    whole = Image.new("RGB", (width, max(half.height for half in sheets) + HEADING_HEIGHT), "white")
    pen, font, left = ImageDraw.Draw(whole), ImageFont.load_default(size=14), 0
    for half, heading in zip(sheets, HEADINGS, strict=True):
        pen.text((left + 6, 6), heading, fill="black", font=font)
        whole.paste(half, (left, HEADING_HEIGHT))
        left += half.width + GAP
    return whole


def compact_png(image: Image.Image, most_bytes: int = MOST_BYTES) -> bytes:
    """The image as a PNG of a palette, of as many colours (256, 128, ... 8) as fit into most_bytes.

    Raises ValueError where 8 colours are still too many.
    """
    for colours in (256, 128, 64, 32, 16, 8):
        buffer = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
        if buffer.tell() <= most_bytes:
            return buffer.getvalue()
    raise ValueError(f"{image.width} x {image.height} pixels do not fit into {most_bytes:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a sheet of images under their prompts.")
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--count", type=int, default=len(TRAINED), help="prompts of each half (default all)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first image of each half; the next has the next")
    options = parser.parse_args()

    try:
        pipeline = latentsmith.Pipeline.from_pretrained(options.run)
    except BadInput as error:
        sys.exit(str(error))

    def generate(prompts: Sequence[str]) -> list[Image.Image]:
        seeds = range(options.seed, options.seed + len(prompts))
        return pipeline(
            prompts, num_inference_steps=options.steps, guidance_scale=options.guidance_scale, seed=list(seeds)
        ).images

    png = compact_png(sheet(generate, [TRAINED[: options.count], UNSEEN[: options.count]]))
    write_bytes(options.out, png)
    print(f"{options.out}: {len(png):,} bytes")


if __name__ == "__main__":
    main()
