"""How `verify` and `doctor` show what they checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xraygpt_lite.cli import console
from xraygpt_lite.report import json, text

if TYPE_CHECKING:
    from xraygpt_lite.values import Check


def show(schema: str, checks: Sequence[Check], as_json: bool, **about: str) -> list[str]:
    """Print the checks as a table, or as one JSON object that also says what they are `about`; return what failed."""
    failed = [check.name for check in checks if check.status == "failed"]
    if as_json:
        console.out(json.line({"schema": schema, **about, "passed": not failed, "checks": checks}))
    else:
        rows = [(check.name, check.status, check.detail) for check in checks]
        console.out(text.table([("CHECK", "RESULT", "DETAIL"), *rows]))
    return failed
