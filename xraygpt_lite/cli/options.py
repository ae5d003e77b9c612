"""The options that several commands share: which model, where it runs, how it writes."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from xraygpt_lite.values import Corners, GenerationOptions

BUNDLE_VAR = "XRAYGPT_LITE_BUNDLE"
_F = TypeVar("_F", bound=Callable[..., Any])

device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where it runs."
)

bundle_option = click.option(
    "--bundle", metavar="NAME|PATH", envvar=BUNDLE_VAR, show_envvar=True, help="The model's bundle."
)

_MODEL = (
    bundle_option,
    device_option,
    click.option("--threads", type=click.IntRange(1, 1024), help="Threads; by default one for each core."),
)

_GENERATION = (
    click.option("--preset", metavar="NAME", help="A named set of the bundle's options."),
    click.option("--prompt", "variant", metavar="VARIANT", help="A wording that the bundle knows."),
    click.option("--max-tokens", type=click.IntRange(1, 100_000), help="Longest answer, in tokens."),
    click.option("--temperature", type=click.FloatRange(0, 10), help="0 always takes the likeliest token."),
    click.option("--top-p", type=click.FloatRange(0, 1), help="Sample from the likeliest share of tokens; 1 is off."),
    click.option("--top-k", type=click.IntRange(0, 1_000_000), help="Sample from so many tokens; 0 is off."),
    click.option("--repeat-penalty", type=click.FloatRange(0.01, 10), help="Above 1, repeats are less likely."),
    click.option("--beams", type=click.IntRange(1, 10), help="Above 1: beam search, which draws nothing."),
    click.option("--seed", type=click.IntRange(0, 2**32 - 2), help="The same seed gives the same answer."),
)


def model_options(command: _F) -> _F:
    """--bundle, --device, --threads."""
    return reduce(lambda inner, option: option(inner), reversed(_MODEL), command)


def generation_options(command: _F) -> _F:
    """--prompt, as `variant`, and the options that `generation` takes."""
    return reduce(lambda inner, option: option(inner), reversed(_GENERATION), command)


def generation(**given: Any) -> GenerationOptions:
    """The record of the options as given; None where the bundle decides."""
    from xraygpt_lite.values import GenerationOptions

    return GenerationOptions(**given)


def box(text: str) -> Corners:
    """X0,Y0,X1,Y1 as typed.

    Raises
    ------
    UsageError
        They are not four numbers, or no rectangle.
    """
    from xraygpt_lite import boxes

    return boxes.corners(text.split(","))
