"""Decides every generation option: explicit over preset over the bundle's default, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from xraygpt_lite.errors import UsageError
from xraygpt_lite.values import GenerationOptions, Manifest, Sampling

_OTHERWISE = ("preset", "stops")  # not just put in place of what is below


def resolve(options: GenerationOptions | None, manifest: Manifest) -> Sampling:
    """Every option's value for one generation.

    The stop strings are the bundle's and then the caller's; `Sampling.preset` names the preset, "default" if none.

    Raises
    ------
    UsageError
        An unknown preset, or a value outside its range; the message names option, value and range. Or a temperature
        with beams: one that only a preset or the bundle asks for gives way, see `undrawn`.
    """
    given = options or GenerationOptions()
    chosen = manifest.defaults
    if given.preset is not None:
        if not isinstance(given.preset, str) or given.preset not in manifest.presets:
            known = ", ".join(sorted(manifest.presets)) or "none"
            raise UsageError(f"preset {given.preset!r} is unknown to bundle {manifest.name!r}; it has: {known}")
        chosen = replace(_over(chosen, manifest.presets[given.preset]), preset=given.preset)
    chosen = _over(chosen, given)
    if fault := chosen.fault():
        raise UsageError(fault)
    if chosen.min_tokens > chosen.max_tokens:
        raise UsageError(f"min_tokens is {chosen.min_tokens}, more than max_tokens, {chosen.max_tokens}")
    if chosen.beams > 1 and chosen.temperature > 0:
        if given.temperature:
            raise UsageError(
                f"temperature is {chosen.temperature} and beams is {chosen.beams}; beam search draws nothing, so leave "
                "out one of them"
            )
        chosen = replace(chosen, temperature=0.0)
    stops: object = () if given.stops is None else given.stops
    if isinstance(stops, str) or not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise UsageError(f"stops is {stops!r}; it must be a sequence of texts")
    if any("\ud800" <= letter <= "\udfff" for stop in stops for letter in stop):
        raise UsageError(f"stops is {stops!r}; it holds half a character (a lone surrogate)")
    return replace(chosen, stops=tuple(dict.fromkeys((*manifest.prompt.stops, *stops))))


def undrawn(chosen: Sampling, manifest: Manifest) -> tuple[str, ...]:
    """What a record has to say where beam search took the place of a preset or bundle that samples; else nothing."""
    if chosen.beams == 1:
        return ()
    preset = manifest.presets.get(chosen.preset, GenerationOptions())
    temperature = _over(manifest.defaults, preset).temperature
    if temperature == 0:
        return ()
    return (
        f"beam search here draws nothing: the temperature {temperature} of preset {chosen.preset!r} was not used, so a "
        "demo that samples within its beams may answer otherwise",
    )


def _over(below: Sampling, above: GenerationOptions) -> Sampling:
    values = {name: value for name, value in vars(above).items() if value is not None and name not in _OTHERWISE}
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    return replace(below, **plain)
