"""`xraygpt-lite merge`: the journals of several runs, e.g. of an array job's shards, become one."""

from __future__ import annotations

from pathlib import Path

import click

from xraygpt_lite.cli import console


@click.command("merge")
@click.argument("journals", nargs=-1, required=True, metavar="OUT...", type=click.Path(exists=True, dir_okay=False))
@click.option("-o", "--output", required=True, metavar="FILE", help="The joined journal, a new file.")
def command(journals: tuple[str, ...], output: str) -> int:
    """Join the journals of several batch runs.

    They must be of the same bundle and options. Shards that are missing, or hold fewer records than inputs, are
    reported (exit code 3); a record that stands in two is kept once.
    """
    from xraygpt_lite.batch.merge import merge

    console.check_name(output)
    merged = merge([Path(journal) for journal in journals], Path(output))
    for gap in merged.gaps:
        console.warn(gap)
    again = f", {merged.overlaps} stood in more than one" if merged.overlaps else ""
    click.echo(f"{merged.records} records, {merged.failures} of them failures{again}: {output}", err=True)
    return 3 if merged.gaps else 0
