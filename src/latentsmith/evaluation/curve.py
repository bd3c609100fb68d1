"""A curve of two values as an image, for where no browser looks at the page."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 480, 80, 30, 30, 60
TICKS = 5
INK, GRID, LINE = (68, 68, 68), (230, 230, 230), (194, 65, 12)


def curve_image(points: Sequence[tuple[float, float]], x_title: str, y_title: str) -> Image.Image:
    """Return a line through the points in their order, with axes that just hold them."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    (x_low, x_high), (y_low, y_high) = (padded([point[axis] for point in points]) for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    for number in range(TICKS):
        share = number / (TICKS - 1)
        x, y = x_low + share * (x_high - x_low), y_low + share * (y_high - y_low)
        across, down = place(x, y)
        pen.line([(across, TOP), (across, HEIGHT - BOTTOM)], fill=GRID)
        pen.line([(LEFT, down), (WIDTH - RIGHT, down)], fill=GRID)
        pen.text((across, HEIGHT - BOTTOM + 6), f"{x:.4g}", fill=INK, font=font, anchor="ma")
        pen.text((LEFT - 8, down), f"{y:.4g}", fill=INK, font=font, anchor="rm")
    pen.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 24), x_title, fill=INK, font=font, anchor="ma")
    pen.text((LEFT, 8), y_title, fill=INK, font=font)
    placed = [place(x, y) for x, y in points]
    pen.line(placed, fill=LINE, width=2)
    for across, down in placed:
        pen.ellipse((across - 4, down - 4, across + 4, down + 4), fill=LINE)
    return image


def padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room, high + room
