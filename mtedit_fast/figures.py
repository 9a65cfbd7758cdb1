"""What figures share: matplotlib axes in a light and a dark theme, and grids of images drawn with pillow."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor


@dataclass(frozen=True)
class Theme:
    text: str
    grid: str
    before: str
    after: str
    cycle: tuple[str, ...]


LIGHT = Theme(
    "#1f2730", "#d9dee4", "#9aa7b5", "#1f6fd6", ("#1f6fd6", "#d9822b", "#2e9e5b", "#8a4fd0", "#c43d6b", "#7a828c")
)
DARK = Theme(
    "#dfe5ec", "#39424d", "#77838f", "#5aa2ff", ("#5aa2ff", "#f0a254", "#58c787", "#b48cf0", "#ee7ba2", "#a4adb8")
)
GOOD, BAD, INK, FAINT = "#1d8a4e", "#cf3b3b", "#1f2730", "#5d6874"


def new_axes(theme: Theme, width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A row of `columns` bare axes in the theme's colours, the whole of width × height inches."""
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")  # Figure itself draws with Agg
    figure.patch.set_alpha(0)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.set_prop_cycle(color=theme.cycle)
        axis.tick_params(colors=theme.text, labelsize=9, length=0)
        axis.grid(color=theme.grid, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[:].set_visible(False)
    return figure, axes


def set_title(axis: Axes, theme: Theme, title: str) -> None:
    """A bold title at the axis's upper left."""
    axis.set_title(title, color=theme.text, fontsize=10, loc="left", fontweight="bold", pad=13)


def add_legend(axis: Axes, theme: Theme, **options: Any) -> None:
    """A frameless legend in the theme's colours."""
    axis.legend(frameon=False, fontsize=8.5, labelcolor=theme.text, **options)


def paste(canvas: Image.Image, image: Tensor, corner: tuple[int, int], cell: int) -> None:
    """Fit an image [3, H, W] in [0, 1] into the square of side `cell` at `corner` (x, y), centred."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels)
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    canvas.paste(picture, (corner[0] + (cell - size[0]) // 2, corner[1] + (cell - size[1]) // 2))


def mark(draw: ImageDraw.ImageDraw, x: int, y: int, cell: int, success: bool) -> None:
    """A green frame and tick or a red frame and cross around the square of side `cell` at (x, y)."""
    colour = GOOD if success else BAD
    draw.rectangle((x - 3, y - 3, x + cell + 2, y + cell + 2), outline=colour, width=3)
    left, top = x + cell - 7, y + cell - 7  # a badge on the frame's corner, not over the image
    draw.rectangle((left, top, left + 17, top + 17), fill=colour)
    strokes = [(4, 9), (7, 13), (14, 4)] if success else [(4, 4), (13, 13), (9, 9), (13, 4), (4, 13)]
    points = [(left + a, top + b) for a, b in strokes]
    for start, end in pairwise(points):
        draw.line((*start, *end), fill="white", width=2)


def wrap_text(text: str, font: Any, width: int, lines: int) -> str:
    """Break at spaces to fit `width` pixels; what exceeds `lines` ends in an ellipsis."""
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if rows[-1] and font.getlength(longer) > width:
            rows.append(word)
        else:
            rows[-1] = longer
    if len(rows) > lines:
        rows = [*rows[: lines - 1], f"{rows[lines - 1]} …"]
    for index, row in enumerate(rows):
        while font.getlength(rows[index]) > width and len(row) > 1:
            row = row[:-1]
            rows[index] = row.rstrip(" …") + "…"
    return "\n".join(rows)
