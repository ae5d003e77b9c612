"""Draws docs/throughput.svg from what the benchmark of batches printed:

python -m benchmarks.batch --table --json | tail -1 > table.json
python tools/throughput_picture.py docs/throughput.svg table.json "nih-tiny, 500 radiographs" [table.json TITLE]...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

WIDTH, BAR, GAP, LEFT, SCALE = 720, 22, 8, 110, 420


def panel(title: str, table: dict[str, dict[str, float]], top: int) -> Iterator[str]:
    """One table as bars of images a minute, the memory written behind them."""
    most = max(row["images_per_minute"] for row in table.values())
    yield f'<text x="12" y="{top}" class="title">{escape(title)}</text>'
    for number, (count, row) in enumerate(table.items()):
        y, rate = top + 14 + number * (BAR + GAP), row["images_per_minute"]
        long = rate / most * SCALE
        shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.2f}"
        yield f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{count} at once</text>'
        yield f'<rect x="{LEFT}" y="{y}" width="{long:.1f}" height="{BAR}" rx="3"/>'
        yield f'<text x="{LEFT + long + 8:.1f}" y="{y + 15}">{shown} a minute, {row["peak_mb"]:,.0f} MB</text>'


def picture(panels: list[tuple[str, dict[str, dict[str, float]]]]) -> str:
    parts: list[str] = []
    top = 28
    for title, table in panels:
        parts += panel(title, table, top)
        top += 44 + len(table) * (BAR + GAP)
    style = (
        "text{font:13px sans-serif;fill:#1b2430}.title{font-weight:bold;font-size:14px}rect{fill:#3b6ea5}"
        "@media(prefers-color-scheme:dark){text{fill:#e6e9ee}rect{fill:#7aa7d9}}"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}" '
        f'role="img" aria-label="Images a minute by radiographs at once">\n<style>{style}</style>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    target, *given = sys.argv[1:]
    pairs = zip(given[::2], given[1::2], strict=True)
    Path(target).write_text(picture([(title, json.loads(Path(path).read_text())) for path, title in pairs]), "utf-8")
