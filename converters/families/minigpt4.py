"""MiniGPT-4: the released XrayGPT's layout under another name, see `xraygpt`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from xraygpt_lite.converters.families import Parts, xraygpt


def load(inputs: Mapping[str, Path], width: int, settings: Mapping[str, str]) -> Parts:
    """As `xraygpt.load`."""
    return xraygpt.load(inputs, width, settings, "minigpt4")
