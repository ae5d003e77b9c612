"""Runs commands and draws what they print as a terminal window: `docs/terminal.svg`, the picture in the README.

python tools/terminal_picture.py docs/terminal.svg "xraygpt-lite summarize examples/synthetic-cr-monochrome1.dcm" …
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from html import escape
from pathlib import Path

COLUMNS, LINE, CHARACTER, MARGIN, BAR = 96, 19, 8.43, 18, 34


def run(command: str) -> list[str]:
    """The command line after a prompt, then what it printed on both streams, wrapped to the window."""
    finished = subprocess.run(
        command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    lines = [f"$ {command}"]
    for line in finished.stdout.rstrip().splitlines():
        lines += textwrap.wrap(line, COLUMNS, drop_whitespace=False, replace_whitespace=False) or [""]
    return [*lines, ""]


def draw(lines: list[str]) -> str:
    """The window as SVG text."""
    width = int(2 * MARGIN + COLUMNS * CHARACTER)
    height = BAR + len(lines) * LINE + MARGIN
    rows = []
    for number, line in enumerate(lines):
        style = "fill='#8bd5a0'" if line.startswith("$ ") else "fill='#d8dee9'"
        y = BAR + (number + 1) * LINE
        rows.append(f"<text x='{MARGIN}' y='{y}' {style} xml:space='preserve'>{escape(line)}</text>")
    dots = "".join(
        f"<circle cx='{MARGIN + 5 + 18 * n}' cy='17' r='5.5' fill='{colour}'/>"
        for n, colour in enumerate(("#ee6a5f", "#f5bd4f", "#61c454"))
    )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}'>\n"
        f"<rect width='100%' height='100%' rx='9' fill='#20252e'/>{dots}\n"
        "<g font-family='DejaVu Sans Mono, Menlo, Consolas, monospace' font-size='14'>\n"
        + "\n".join(rows)
        + "\n</g></svg>\n"
    )


if __name__ == "__main__":
    target, *commands = sys.argv[1:]
    Path(target).write_text(draw([line for command in commands for line in run(command)][:-1]), encoding="utf-8")
