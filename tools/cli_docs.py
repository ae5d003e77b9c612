"""Writes docs/cli.md from the command line's own help: `python tools/cli_docs.py`; with --check it only compares."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from xraygpt_lite.cli import PROGRAM, main

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = f"""\
# The command line

Written by `python tools/cli_docs.py` from `{PROGRAM} --help`: change the commands, not this file.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | usage: an option, question or argument that cannot be meant; nothing was run |
| 3 | finished, with failures among several inputs |
| 4 | a bundle was refused by verification |
| 130 | interrupted |

Answers go to standard output; errors and warnings, a sentence each, to standard error. Every answer comes with the
bundle's disclaimer. The lines of `summarize --json` are described by `xraygpt_lite/report/record.schema.json`.
"""


def sections(command: click.Command, path: str, parent: click.Context | None = None) -> Iterator[str]:
    """The help of a command and of all below it."""
    with click.Context(command, parent, path.split()[-1], terminal_width=100, max_content_width=100) as ctx:
        yield f"\n## {path}\n\n```text\n{command.get_help(ctx)}\n```\n"
        if isinstance(command, click.Group):
            for name in command.list_commands(ctx):
                below = command.get_command(ctx, name)
                assert below is not None
                yield from sections(below, f"{path} {name}", ctx)


def document() -> str:
    return HEAD + "".join(sections(main, PROGRAM))


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text("utf-8") == document() else f"{TARGET} is out of date: run tools/cli_docs.py")
    TARGET.write_text(document(), "utf-8")
