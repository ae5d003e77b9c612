"""The figures of `runner.run` as a chart: a self-contained SVG, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from xraygpt_lite.bench.runner import STAGES

WIDTH, BAR, GAP, LEFT, SCALE = 720, 20, 8, 170, 400
_STYLE = (
    "text{font:13px sans-serif;fill:#1b2430}.title{font-weight:bold;font-size:14px}.note{font-size:12px;fill:#5a6675}"
    "rect{fill:#3b6ea5}.bound{fill:#a9b8c9}path{stroke:#1b2430;fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e9ee}.note{fill:#a3adba}rect{fill:#7aa7d9}.bound{fill:#56657a}"
    "path{stroke:#e6e9ee}}"
)
RATES = (
    ("as used", "tokens_per_s", ""),
    ("without guesses", "tokens_per_s_plain", ""),
    ("bare loop", "tokens_per_s_bare", "bound"),
    ("memory's speed", "tokens_per_s_bandwidth", "bound"),
)
"""What is written behind a bar, of which figure, and its class."""


def svg(figures: Mapping[str, Any]) -> str:
    """Two panels: seconds of each stage with their spread, and tokens a second beside the two ceilings."""
    spread, machine = figures["spread"], figures["machine"]
    stages = [(name, figures["stages_s"][name], spread[name], "") for name in STAGES]
    rates = [(name, figures[key], spread[key], kind) for name, key, kind in RATES if figures[key] is not None]
    notes = (
        f"{machine['cpu']}, {figures['threads']} threads; {machine['compiler']}",
        f"first token after {shown(figures['first_token_s'])} s, whole answer after {shown(figures['total_s'])} s, "
        f"memory {figures['peak_rss_mb']:,.0f} MB",
        f"bars: medians of {figures['repeats']} repetitions; lines: from the lowest to the highest",
    )
    parts = [_text(12, 28, f"{figures['bundle']}: {weights(figures)}", "title")]
    parts += [_text(12, 46 + 16 * number, note, "note") for number, note in enumerate(notes)]
    top = 110
    for title, rows in (("Seconds of each stage of one image, from the start of Python", stages),
                        ("Tokens a second while an answer is written, and two bounds", rates)):  # fmt: skip
        parts += _panel(title, rows, top)
        top += 44 + len(rows) * (BAR + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top - 20}" viewBox="0 0 {WIDTH} {top - 20}" '
        'role="img" aria-label="Seconds of each stage, and tokens a second">\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(title: str, rows: Sequence[tuple[str, float, Sequence[float], str]], top: int) -> Iterator[str]:
    """Bars, each with its spread as a line and its value behind both."""
    most = max(high for _, _, (_, high), _ in rows) or 1.0
    yield _text(12, top, title, "title")
    for number, (name, value, (low, high), kind) in enumerate(rows):
        y = top + 14 + number * (BAR + GAP)
        start, long, end = (LEFT + each / most * SCALE for each in (low, value, high))
        yield f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
        yield f'<rect x="{LEFT}" y="{y}" width="{long - LEFT:.1f}" height="{BAR}" rx="3" class="{kind}"/>'
        yield f'<path d="M{start:.1f} {y + BAR / 2}H{end:.1f}"/>'
        yield _text(round(max(long, end)) + 8, y + 15, shown(value))


def _text(x: int, y: int, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>'


def weights(figures: Mapping[str, Any]) -> str:
    """The weight type of each part, in the order in which an image passes them."""
    return ", ".join(f"{part} {figures['weight_types'][part]}" for part in ("vision", "projector", "llm"))


def shown(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 or not value else f"{value:.6f}"
