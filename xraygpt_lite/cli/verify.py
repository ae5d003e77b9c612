"""`xraygpt-lite verify`: every check of a bundle and its self-test, as a table."""

from __future__ import annotations

from pathlib import Path

import click

from xraygpt_lite.cli import checks, console, options
from xraygpt_lite.errors import UsageError
from xraygpt_lite.report import json, text


@click.command("verify")
@click.argument("bundle", required=False, metavar="[NAME|PATH]", envvar=options.BUNDLE_VAR)
@click.option("--against", metavar="NAME|PATH", help="Compare with this bundle of the same model in another precision.")
@click.option("--check-images", metavar="DIR", type=click.Path(path_type=Path), help="Radiographs to compare on.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@options.device_option
def command(bundle: str | None, against: str | None, check_images: Path | None, as_json: bool, device: str) -> int:
    """Check a bundle's files and what it answers.

    Without an argument: the bundle that XRAYGPT_LITE_BUNDLE names, else the default one. Every file is hashed, then the
    model answers about a generated picture and is compared with what the bundle recorded. Exit code 4 if a check fails.

    With --against, both models see the same radiographs (by default the installed examples, which are synthetic), and
    what differs is printed instead. Exit code 4 if the image tokens agree too little.
    """
    from xraygpt_lite import verify
    from xraygpt_lite.bundle import store

    if check_images and not against:
        raise UsageError("--check-images goes with --against: it names the radiographs to compare on")
    folder = store.find(bundle)
    if against:
        return _compare(folder, store.find(against), check_images, as_json, device)
    failed = checks.show("xraygpt-lite/verify/1", verify.run(folder, device=device), as_json, bundle=str(folder))
    if failed:
        console.error(f"the bundle {folder} fails verification: {', '.join(failed)}; install or convert it again")
    return 4 if failed else 0


def _compare(folder: Path, against: Path, images: Path | None, as_json: bool, device: str) -> int:
    from xraygpt_lite import compare

    figures = compare.bundles(folder, against, images, device=device)
    lacking = compare.shortfall(figures)
    if as_json:
        about = {"bundle": str(folder), "against": str(against), "passed": lacking is None}
        console.out(json.line({"schema": "xraygpt-lite/compare/1", **about, "figures": figures}))
    else:
        rows = [(name, f"{figures[name]:.4g}", meaning) for name, meaning in compare.FIGURES.items()]
        console.out(text.table([("FIGURE", "VALUE", "WHAT"), *rows]))
    if lacking:
        console.error(f"{folder}: {lacking}")
    return 4 if lacking else 0
