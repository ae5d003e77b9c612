"""`xraygpt-lite doctor`: what this installation consists of, and whether it runs here."""

from __future__ import annotations

import click

from xraygpt_lite.cli import checks, console, options


@click.command("doctor")
@options.bundle_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(bundle: str | None, as_json: bool) -> int:
    """Show what runs here, and whether it runs.

    Versions, CPU features, providers, GPU, how llama.cpp was compiled, and a self-test of it in a process of its own.
    Exit code 1 if a check fails. Nothing of it tells of a patient: it may be pasted into a bug report.
    """
    from xraygpt_lite import doctor

    failed = checks.show("xraygpt-lite/doctor/1", doctor.run(bundle), as_json)
    if failed:
        console.error(f"this installation needs mending: {', '.join(failed)}")
    return 1 if failed else 0
