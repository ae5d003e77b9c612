"""The command line: parses, calls, prints; the only room that prints and exits.

`main` is a click group that imports a command's file when that command runs, so `--help` loads nothing else. Every
failure ends here: one sentence on stderr and the exit code of the error's class.

Exit codes: 0 done, 1 failed, 2 usage, 3 finished with failures among several inputs, 4 a bundle was refused,
130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from xraygpt_lite import __version__
from xraygpt_lite.cli import console
from xraygpt_lite.errors import XrayError

PROGRAM = console.PROGRAM
COMPLETE_VAR = "_XRAYGPT_LITE_COMPLETE"

# name → what it does, in one line; the file xraygpt_lite/cli/<name>.py has it as `command`
COMMANDS = {
    "summarize": "Describe chest radiographs in words.",
    "batch": "Summarize files and folders of radiographs, several at once.",
    "report": "Show the results of a batch run as a page, a table or text.",
    "merge": "Join the journals of several batch runs.",
    "chat": "Ask questions about one radiograph in the terminal.",
    "verify": "Check a bundle's files and what it answers.",
    "doctor": "Show what runs here, and whether it runs.",
    "bench": "Measure how fast a bundle is on this machine.",
    "models": "List, add and remove bundles.",
    "convert": "Make a bundle from a published checkpoint.",
    "completion": "Print the script that completes this program in a shell.",
}


class Commands(click.Group):
    """A group whose commands are files, imported when asked for; it ends the process for every one of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 (click's signature)
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"{__name__}.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 (click's)
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            if ctx.params["debug"]:
                traceback.print_exc()
            raise

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,  # noqa: ARG002 (the name is the same however the program was started)
        complete_var: str | None = None,  # noqa: ARG002 (so is the variable)
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run one command and exit with its code, which is what the command returns; or raise, if not standalone."""
        console.prepare()
        try:
            code = super().main(args, PROGRAM, COMPLETE_VAR, standalone_mode=False, **extra)
        except Exception as error:
            if not standalone_mode:
                raise
            code = _explain(error)
        if not standalone_mode:
            return code
        sys.exit(code or 0)


def _explain(error: Exception) -> int:
    """Say in one sentence on stderr what went wrong; return the exit code."""
    if isinstance(error, click.Abort):
        return 130
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else PROGRAM
        message = error.format_message()
        console.error(f"{message[:1].lower()}{message[1:].rstrip('.')}; see: {where} --help")
        return error.exit_code
    if isinstance(error, XrayError):
        console.error(str(error))
        return error.exit_code
    if isinstance(error, MemoryError):
        console.error("memory ran out; close other programs, or use a smaller bundle")
        return 1
    if isinstance(error, OSError) and error.errno is not None:
        console.silence_stdout()
        at = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
        console.error(f"the system refused a file operation: {os.strerror(error.errno)}{at}")
        return 1
    console.error(
        f"internal error ({type(error).__name__}): this is a bug of {PROGRAM}; please report it with what "
        f"`{PROGRAM} --debug COMMAND …` and `{PROGRAM} doctor` print, without patient data"
    )
    return 1


def _version(ctx: click.Context, _param: click.Parameter, asked: bool) -> None:
    if not asked or ctx.resilient_parsing:
        return
    click.echo(f"{PROGRAM} {__version__}")
    ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def main(debug: bool) -> None:  # read from the context, where an error passes
    """Chest-radiograph summarization on your own machine, offline.

    Research use only, not a medical device.
    """
