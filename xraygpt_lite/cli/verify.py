"""`xraygpt-lite verify`: every check of a bundle and its self-test, as a table."""

from __future__ import annotations

import click

from xraygpt_lite.cli import checks, console, options


@click.command("verify")
@click.argument("bundle", required=False, metavar="[NAME|PATH]", envvar=options.BUNDLE_VAR)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@options.device_option
def command(bundle: str | None, as_json: bool, device: str) -> int:
    """Check a bundle's files and what it answers.

    Without an argument: the bundle that XRAYGPT_LITE_BUNDLE names, else the default one. Every file is hashed, then the
    model answers about a generated picture and is compared with what the bundle recorded. Exit code 4 if a check fails.
    """
    from xraygpt_lite import verify
    from xraygpt_lite.bundle import store

    folder = store.find(bundle)
    failed = checks.show("xraygpt-lite/verify/1", verify.run(folder, device=device), as_json, bundle=str(folder))
    if failed:
        console.error(f"the bundle {folder} fails verification: {', '.join(failed)}; install or convert it again")
    return 4 if failed else 0
