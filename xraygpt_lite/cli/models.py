"""`xraygpt-lite models`: the bundles that can be named, and the user's own among them."""

from __future__ import annotations

from pathlib import Path

import click

from xraygpt_lite.cli import console


@click.group("models", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """List, add and remove bundles.

    Without a command: name, origin and folder of every bundle that --bundle knows by name.
    """
    if ctx.invoked_subcommand is not None:
        return
    from xraygpt_lite.bundle import store
    from xraygpt_lite.report import text

    rows = [
        (item.name + (" (default)" if item.name == store.DEFAULT else ""), item.origin, str(item.path))
        for item in store.installed()
    ]
    console.out(text.table([("NAME", "ORIGIN", "FOLDER"), *rows]))


@command.command("add")
@click.argument("path", metavar="PATH")
@click.option("--replace", is_flag=True, help="Replace an installed bundle of the same name.")
def add(path: str, replace: bool) -> None:
    """Check the bundle in the folder PATH and copy it into the user's data folder."""
    from xraygpt_lite.bundle import store

    folder = store.add(Path(path), replace=replace)
    console.out(f"{folder.name} is installed in {folder}\n")


@command.command("remove")
@click.argument("name", metavar="NAME")
def remove(name: str) -> None:
    """Delete an installed bundle."""
    from xraygpt_lite.bundle import store

    store.remove(name)
    console.out(f"{name} is removed\n")
