"""`xraygpt-lite completion`: the script that makes a shell complete this program's commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from xraygpt_lite.cli import COMPLETE_VAR, PROGRAM, console


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes this program in a shell.

    \b
    bash: eval "$(xraygpt-lite completion bash)" in ~/.bashrc
    zsh:  eval "$(xraygpt-lite completion zsh)" in ~/.zshrc
    fish: xraygpt-lite completion fish > ~/.config/fish/completions/xraygpt-lite.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    console.out(kind(ctx.find_root().command, {}, PROGRAM, COMPLETE_VAR).source() + "\n")
