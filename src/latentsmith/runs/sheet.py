"""Contact sheets: pictures under their prompts."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARK = (200, 40, 30)


def labelled_sheet(
    cells: Sequence[tuple[np.ndarray, str, bool]], *, columns: int = 8, zoom: int = 2, lines: int = 3
) -> Image.Image:
    """Pictures (height, width, 3) uint8 of one size, `zoom` times as large, each with its text below; those marked
    (True) are framed."""
    height, width = (side * zoom for side in cells[0][0].shape[:2])
    pad, line = 6, 11
    rows = -(-len(cells) // columns)
    cell_height = height + lines * line + 2 * pad
    sheet = Image.new("RGB", (columns * (width + pad) + pad, rows * cell_height + pad), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for number, (picture, text, marked) in enumerate(cells):
        left, top = pad + number % columns * (width + pad), pad + number // columns * cell_height
        if marked:
            pen.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), fill=MARK)
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS), (left, top))
        words = textwrap.wrap(text, width // 5)[:lines]
        pen.multiline_text(
            (left, top + height + 3), "\n".join(words), fill=MARK if marked else "black", font=font, spacing=1
        )
    return sheet
