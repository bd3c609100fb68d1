"""Contact sheets: images under their prompts, or between two axes."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARK = (200, 40, 30)


def labelled_sheet(
    cells: Sequence[tuple[np.ndarray, str, bool]], *, columns: int = 8, zoom: int = 2, lines: int = 3
) -> Image.Image:
    """Return a sheet of images (height, width, 3), uint8, of one size, `zoom` times as large, each above its text.

    cells: (image, text, whether it is framed).
    """
    height, width = (side * zoom for side in cells[0][0].shape[:2])
    pad, line = 6, 11
    rows = -(-len(cells) // columns)
    cell_height = height + lines * line + 2 * pad
    sheet = Image.new("RGB", (columns * (width + pad) + pad, rows * cell_height + pad), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for number, (image, text, marked) in enumerate(cells):
        left, top = pad + number % columns * (width + pad), pad + number // columns * cell_height
        if marked:
            pen.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), fill=MARK)
        sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS), (left, top))
        wrapped = "\n".join(textwrap.wrap(text, width // 5)[:lines])
        pen.multiline_text((left, top + height + 3), wrapped, fill=MARK if marked else "black", font=font, spacing=1)
    return sheet


def axis_sheet(
    images: Sequence[Sequence[np.ndarray]], rows: Sequence[str], columns: Sequence[str], title: str
) -> Image.Image:
    """Return rows of images (height, width, 3), uint8, of one size, with labels at rows and columns and a title."""
    height, width = images[0][0].shape[:2]
    zoom = max(1, 128 // width)
    height, width, pad = height * zoom, width * zoom, 4
    font = ImageFont.load_default(size=12)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max((int(measure.textlength(label, font=font)) for label in rows), default=0) + 2 * pad
    top, across = 40, max(width + pad, *(int(measure.textlength(label, font=font)) + 2 * pad for label in columns), 0)
    sheet = Image.new("RGB", (margin + len(columns) * across + pad, top + len(rows) * (height + pad) + pad), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((pad, pad), textwrap.shorten(title, max(8, sheet.width // 7), placeholder="..."), fill="black", font=font)
    for column, label in enumerate(columns):
        pen.text((margin + column * across, 22), label, fill="black", font=font)
    for row, (label, line) in enumerate(zip(rows, images, strict=True)):
        y = top + row * (height + pad)
        pen.text((pad, y + height // 2 - 6), label, fill="black", font=font)
        for column, image in enumerate(line):
            cell = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(cell, (margin + column * across, y))
    return sheet
