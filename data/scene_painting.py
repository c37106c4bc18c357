"""Painting scenes: sprites of the shapes, letters of the signs."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.scene_world import (
    BACKGROUND,
    BLOCK,
    COLORS,
    IMAGE_SIZE,
    INK,
    LATTICE,
    PLAQUE,
    PLAQUE_ROWS,
    shape_coverage,
)
from data.scene_content import Scene


@cache
def _sprite(label: str, color: str, jitter_x: float, jitter_y: float) -> np.ndarray:
    coverage = shape_coverage(label, BLOCK / 2 + jitter_x, BLOCK / 2 + jitter_y, BLOCK)[..., None]
    paint = coverage * np.array(COLORS[color]) + (1 - coverage) * np.array(BACKGROUND)
    return paint.round().astype(np.uint8)


@cache
def _glyph(letter: str) -> np.ndarray:
    """One letter cell, 16 x 8 pixels, dark ink on the plaque."""
    scale = 8
    font = ImageFont.load_default(size=13.5 * scale)
    tile = Image.new("RGB", (LATTICE * scale, BLOCK * scale), PLAQUE)
    draw = ImageDraw.Draw(tile)
    left, top, right, bottom = draw.textbbox((0, 0), letter, font=font, stroke_width=scale // 4)
    ink = Image.new("L", (int(right - left), int(bottom - top)), 0)
    ImageDraw.Draw(ink).text((-left, -top), letter, 255, font=font, stroke_width=scale // 4)
    ink = ink.resize((7 * scale, 10 * scale), Image.Resampling.BICUBIC)
    tile.paste(INK, (scale // 2, 3 * scale), ink)
    return np.asarray(tile.resize((LATTICE, BLOCK), Image.Resampling.BOX))


def paint(scene: Scene) -> np.ndarray:
    """Return the picture as uint8 [48, 48, 3]."""
    picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    picture[:] = BACKGROUND
    if scene.word is not None:
        top, bottom = PLAQUE_ROWS
        picture[top:bottom] = PLAQUE
        start = (IMAGE_SIZE // LATTICE - len(scene.word)) // 2
        for i, letter in enumerate(scene.word):
            left = (start + i) * LATTICE
            picture[top:bottom, left : left + LATTICE] = _glyph(letter)
    for item in scene.objects:
        x, y = item.cell[0] * LATTICE - BLOCK // 2, item.cell[1] * LATTICE - BLOCK // 2
        picture[y : y + BLOCK, x : x + BLOCK] = _sprite(item.label, item.color, *item.jitter)
    return picture


def render_scene(scene: Scene) -> Image.Image:
    """Return the picture of a scene, 48 x 48 RGB."""
    return Image.fromarray(paint(scene))
