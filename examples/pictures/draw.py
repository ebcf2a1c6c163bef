"""Pictures of four kinds, with one question for all, and the results of four experts on them."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image, ImageDraw, ImageFilter

QUESTION = "What does this picture show?"
SIDE = 112

Colour = tuple[int, int, int]


def chart(draw: Any, rng: random.Random, ink: Colour) -> None:
    """Draw bars over an axis."""
    colour = _colour(rng)
    for place in range(rng.randint(4, 7)):
        left = 10 + place * 14
        draw.rectangle((left, rng.randint(20, 90), left + 9, 100), fill=colour)
    draw.line((6, 100, 108, 100), fill=ink, width=2)
    draw.line((6, 8, 6, 100), fill=ink, width=2)


def page(draw: Any, rng: random.Random, ink: Colour) -> None:
    """Draw lines of words."""
    for top in range(8, 104, rng.choice((7, 8, 9))):
        left = 8
        while left < 90:
            width = rng.randint(4, 16)
            draw.rectangle((left, top, min(left + width, 104), top + 3), fill=ink)
            left += width + 4


def scene(draw: Any, rng: random.Random, ink: Colour) -> None:
    """Draw a sky, hills, a sun and a post."""
    horizon = rng.randint(30, 80)
    draw.rectangle((0, 0, SIDE, horizon), fill=(rng.randint(90, 190), rng.randint(150, 200), 235))
    draw.rectangle((0, horizon, SIDE, SIDE), fill=(rng.randint(30, 150), rng.randint(110, 190), 60))
    for _ in range(rng.randint(2, 4)):
        middle, height = rng.randint(0, SIDE), rng.randint(12, 30)
        hill = (middle - 30, horizon - height, middle + 30, horizon + height)
        draw.ellipse(hill, fill=(50, rng.randint(90, 140), 60))
    sun, post = rng.randint(10, 90), rng.randint(10, 100)
    draw.ellipse((sun, 8, sun + 16, 24), fill=(250, 220, 80))
    draw.line((post, horizon - 10, post, horizon + 10), fill=ink, width=2)


def diagram(draw: Any, rng: random.Random, ink: Colour) -> None:
    """Draw rings and lines that connect them."""
    places = [(rng.randint(12, 100), rng.randint(12, 100)) for _ in range(rng.randint(4, 6))]
    for one, other in itertools.pairwise(places):
        draw.line((*one, *other), fill=_colour(rng), width=2)
    for x, y in places:
        draw.ellipse((x - 9, y - 9, x + 9, y + 9), outline=ink, width=2, fill="white")


KINDS: dict[str, Callable[[Any, random.Random, Colour], None]] = {
    "charts": chart, "pages": page, "scenes": scene, "diagrams": diagram,
}  # fmt: skip
"""Functions that draw the kinds, by the name of the expert that is right about the kind."""


def _colour(rng: random.Random, least: int = 60, most: int = 200) -> Colour:
    return rng.randint(least, most), rng.randint(least, most), rng.randint(least, most)


def draw_pictures(folder: Path, count: int = 50, seed: int = 0) -> Path:
    """Draw pictures and write the results of four experts on them as a table.

    Args:
        folder: Folder to write. It will hold `pictures/` and `results.csv`.
        count: Number of pictures of each kind.
        seed: Seed of the pictures and of the table's order.

    Returns:
        The path of the table.
    """
    rng = random.Random(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        for kind, paint in KINDS.items():
            picture = Image.new("RGB", (SIDE, SIDE), _colour(rng, 200, 255))
            paint(ImageDraw.Draw(picture), rng, _colour(rng, 0, 80))
            name = f"{kind}-{number:03}.png"
            picture.filter(ImageFilter.GaussianBlur(rng.random())).save(folder / "pictures" / name)
            scores = {expert: int(expert == kind) for expert in KINDS}
            rows.append({"query": QUESTION, "image": name, "benchmark": "pictures", **scores})
    rng.shuffle(rows)
    table = folder / "results.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    return table
