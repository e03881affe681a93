"""Contact sheets: rows of labelled pictures with a caption, for people."""

import io
from bisect import bisect_right
from collections.abc import Sequence
from math import ceil

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN = 10
LABEL = 22  # px for the captions beside and above the pictures
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
BACKGROUND, INK, FAINT = (250, 250, 248), (30, 30, 30), (120, 120, 120)


def grid(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[np.ndarray]]], side: int = 128, blocks: int = 2
) -> bytes:
    """PNG of `rows` (caption, one picture a column), laid out in that many blocks side by side.

    Pictures are uint8 (H, W, 3); each is shown with its longer side `side` px. `columns` name them in the header. Of a
    caption that is longer than its pictures are wide the end is cut off.
    """
    font = ImageFont.load_default(14)
    blocks = min(blocks, len(rows))
    per_block = -(-len(rows) // blocks)
    block_width = len(columns) * (side + MARGIN) + 2 * MARGIN
    height = 2 * MARGIN + LABEL + per_block * (side + LABEL + MARGIN)
    sheet = Image.new("RGB", (blocks * block_width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for block in range(blocks):
        left = block * block_width + MARGIN
        for number, name in enumerate(columns):
            draw.text((left + number * (side + MARGIN), MARGIN), name, fill=FAINT, font=font)
        for place, (caption, pictures) in enumerate(rows[block * per_block : (block + 1) * per_block]):
            top = MARGIN + LABEL + place * (side + LABEL + MARGIN)
            draw.text((left, top), _cut(caption, block_width - 2 * MARGIN, font), fill=INK, font=font)
            for number, picture in enumerate(pictures):
                shown = ImageOps.contain(Image.fromarray(picture), (side, side), Image.Resampling.LANCZOS)
                sheet.paste(shown, (left + number * (side + MARGIN), top + LABEL))
    return png(np.asarray(sheet))


def _cut(text: str, width: int, font: Font) -> str:
    """As much of a text, on one line, as fits into so many px."""
    line = " ".join(text.split())
    start = line[:width]  # a letter takes a px at least, and to measure ten thousand of them takes a while
    if start == line and font.getlength(line) <= width:
        return line
    ends = range(1, len(start) + 1)
    return f"{start[: bisect_right(ends, width, key=lambda end: ceil(font.getlength(f'{start[:end]}...')))]}..."


def png(picture: np.ndarray) -> bytes:
    """A uint8 picture (H, W, 3) as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
