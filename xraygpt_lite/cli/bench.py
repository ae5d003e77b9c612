"""`xraygpt-lite bench`: how fast a bundle is here, and how near to what the machine could do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from xraygpt_lite.cli import console, interrupt, options
from xraygpt_lite.errors import UsageError
from xraygpt_lite.report import json, text

_FIGURES = {
    "tokens_per_s": "tokens a second of an answer, as used",
    "tokens_per_call": "tokens that one decode call gave on average",
    "tokens_per_s_plain": "tokens a second without guessing at next ones",
    "tokens_per_s_bare": "tokens a second of a bare loop over llama_decode with the same rows",
    "tokens_per_s_bandwidth": "tokens a second if all weights came from memory and nothing else took time",
    "decode_vs_bare": "share of the bare loop's speed, without guessing; 1 is all of it",
    "decode_vs_bandwidth": "share of what the memory's speed allows, without guessing",
    "prefill_vs_bare": "the prompt's share of the bare loop's speed, without the prompt cache",
    "bandwidth_gb_s": "GB a second that the threads read from memory",
}
_ONCE = {
    "first_answer_s": "seconds from the process's start to the end of its first answer",
    "token_mb": "MB of weights that are read for one token",
    "peak_rss_mb": "MB of memory at the peak of a run",
    "files_mb": "MB of the bundle's files",
    "kv_cache_mb": "MB of the KV cache",
}

_MUCH = 0.05
"""From this share of others' work on, figures say little."""

_NOTES = {
    "start": "of Python, until it runs this program",
    "import": "with the native libraries",
    "load": "with the checks of the bundle",
    "prefill": "the prompt, after which the first token is known",
    "rest": "the prompt's words, and the record",
    "first token": "from opening the file",
    "total": "from opening the file to the end of the answer",
}


@click.command("bench")
@click.option(
    "--images", "first", metavar="PATH...", help="Radiographs to answer for; by default an installed example."
)
@click.argument("more", nargs=-1, metavar="")
@click.option(
    "--tokens", type=click.IntRange(2, 100_000), help="Length of every answer; by default as the bundle ends it."
)
@click.option(
    "--repeats", type=click.IntRange(1, 1000), default=5, show_default=True, help="Repetitions of everything."
)
@click.option("--no-speculation", is_flag=True, help="Do not guess at next tokens.")
@click.option("--no-prompt-cache", is_flag=True, help="Do not read the prompt's fixed text from the cache folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--plot", metavar="FILE.svg", help="Draw the figures as a chart.")
@options.model_options
def command(
    first: str | None,
    more: tuple[str, ...],
    tokens: int | None,
    repeats: int,
    no_speculation: bool,
    no_prompt_cache: bool,
    as_json: bool,
    plot: str | None,
    bundle: str | None,
    device: str,
    threads: int | None,
) -> int:
    """Measure how fast a bundle is on this machine.

    A process of its own imports, loads, warms up and answers about each image again and again, as a first question is
    answered: greedily, the process's earlier answers forgotten. Then the same rows go through a bare loop over
    llama_decode, in turn with ours, and the memory's speed is measured. Figures are medians and spreads. A large model
    takes minutes on a CPU; --tokens 40 --repeats 3 is shorter.
    """
    if more and first is None:
        raise UsageError(f"{more[0]!r} stands alone; images are named behind --images")
    images = (first, *more) if first is not None else ()
    if plot is not None and not plot.lower().endswith(".svg"):
        raise UsageError(f"--plot {plot} is written as SVG; name a file that ends in .svg")
    target = console.OutputFile(plot, images, "--plot") if plot is not None else None
    from xraygpt_lite.bench import picture, runner

    with interrupt.heard():
        figures = runner.run(
            bundle,
            images,
            device=device,
            threads=threads,
            tokens=tokens,
            repeats=repeats,
            speculation=not no_speculation,
            prompt_cache=not no_prompt_cache,
            doing=console.doing if sys.stderr.isatty() else lambda _: None,
        )
    if target:
        target.write(picture.svg(figures).encode())
    console.out(json.line(figures) if as_json else "".join(_tables(figures)))
    return 0


def _tables(figures: dict[str, Any]) -> Iterator[str]:
    """What was measured, the stages, the other figures."""
    from xraygpt_lite.bench.picture import shown

    machine, spread = figures["machine"], figures["spread"]
    yield text.table([(name, value) for name, value in _about(figures, machine)]) + "\n"
    stages = {**figures["stages_s"], "first token": figures["first_token_s"], "total": figures["total_s"]}
    table: list[tuple[str, ...]] = [("STAGE", "SECONDS", "LOWEST", "HIGHEST", "")]
    for name, value in stages.items():
        low, high = spread[name if name in spread else f"{name.replace(' ', '_')}_s"]
        table.append((name, shown(value), shown(low), shown(high), _NOTES.get(name, "")))
    yield text.table(table) + "\n"
    table = [("FIGURE", "VALUE", "LOWEST", "HIGHEST", "WHAT")]
    for name, what in _FIGURES.items():
        value, (low, high) = figures[name], spread.get(name, (None, None))
        table.append((name, *("-" if each is None else shown(each) for each in (value, low, high)), what))
    table += [(name, shown(figures[name]), "", "", what) for name, what in _ONCE.items()]
    yield text.table(table)
    if figures["decode_vs_bandwidth"] and figures["token_mb"] < machine["cache_mb"]:
        yield f"\nThe weights fit this CPU's cache of {machine['cache_mb']:.0f} MB: the memory's speed is no bound.\n"
    if (figures["others_share"] or 0) > _MUCH:
        yield f"\n{figures['others_share']:.0%} of the processors' time went to others: measure again without them.\n"
    if not figures["same_tokens"]:
        yield "\nNot the same tokens were chosen with guesses, without them and by the bare loop.\n"


def _about(figures: dict[str, Any], machine: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was measured, on what."""
    from xraygpt_lite.bench.picture import weights

    lengths, several = figures["answer_tokens"], "s" if figures["images"] > 1 else ""
    tokens = " to ".join(map(str, sorted({min(lengths), max(lengths)})))
    on = {name: "on" if figures[name] else "off" for name in ("speculation", "prompt_cache")}
    yield "bundle", f"{figures['bundle']}, id {figures['bundle_id'][:12]}; {weights(figures)}"
    yield "machine", f"{machine['cpu']}, {machine['cores']} of {machine['cores_of_machine']} cores; {machine['system']}"
    yield "compiler", f"{machine['compiler']} (llama.cpp)"
    yield "features", machine["features"]
    yield "versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    yield "plan", f"{'; '.join(figures['reasons'])}; {', '.join(figures['providers'])}"
    yield "answers", f"{figures['images']} image{several}, {tokens} tokens"
    yield "used", f"guesses at next tokens {on['speculation']}, prompt cache {on['prompt_cache']}"
    yield "repeated", f"{figures['repeats']} times after a warm-up, {figures['rounds']} times beside the bare loop"
