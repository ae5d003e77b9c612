"""Explicit over preset over bundle default; every value in its range."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_bundle

from xraygpt_lite.errors import UsageError
from xraygpt_lite.options import resolve, undrawn
from xraygpt_lite.values import GenerationOptions, Manifest, Sampling


@pytest.fixture
def manifest() -> Manifest:
    plain: Manifest = tiny_bundle.plain_manifest()
    presets = {"authors": GenerationOptions(temperature=1.0, top_p=0.9, max_tokens=64)}
    return replace(plain, defaults=Sampling(max_tokens=16, top_k=7), presets=presets)


def test_without_options_the_bundle_decides(manifest: Manifest) -> None:
    assert resolve(None, manifest) == Sampling(max_tokens=16, top_k=7, stops=("###",), preset="default")


def test_explicit_over_preset_over_default(manifest: Manifest) -> None:
    chosen = resolve(GenerationOptions(preset="authors", max_tokens=5), manifest)
    assert (chosen.max_tokens, chosen.temperature, chosen.top_p, chosen.top_k) == (5, 1.0, 0.9, 7)
    assert chosen.preset == "authors"


def test_an_explicit_zero_is_not_a_missing_value(manifest: Manifest) -> None:
    assert resolve(GenerationOptions(preset="authors", temperature=0.0), manifest).temperature == 0.0


def test_numpys_numbers_are_numbers(manifest: Manifest) -> None:
    given = GenerationOptions(max_tokens=np.int64(3), temperature=np.float32(0.5))  # type: ignore[arg-type]
    chosen = resolve(given, manifest)
    assert (chosen.max_tokens, chosen.temperature) == (3, 0.5)
    assert (type(chosen.max_tokens), type(chosen.temperature)) == (int, float)


def test_further_stops_join_the_bundles(manifest: Manifest) -> None:
    assert resolve(GenerationOptions(stops=("END", "###")), manifest).stops == ("###", "END")


def test_an_unknown_preset_is_refused_with_the_known_ones(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="preset 'creative' is unknown to bundle 'tiny'; it has: authors"):
        resolve(GenerationOptions(preset="creative"), manifest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GenerationOptions(max_tokens=0), "max_tokens is 0; it must lie between 1"),
        (GenerationOptions(temperature=-1.0), "temperature is -1"),
        (GenerationOptions(temperature=float("nan")), "temperature is nan"),
        (GenerationOptions(top_p=1.5), "top_p is 1.5; it must lie between 0 and 1"),
        (GenerationOptions(beams=11), "beams is 11; it must lie between 1 and 10"),
        (GenerationOptions(beams=4, temperature=0.7), "temperature is 0.7 and beams is 4; beam search draws nothing"),
        (GenerationOptions(preset="authors", beams=4, temperature=1.0), "temperature is 1.0 and beams is 4"),
        (GenerationOptions(max_tokens=10.5), "max_tokens is 10.5; it must be a whole number"),  # type: ignore[arg-type]
        (GenerationOptions(top_k=True), "top_k is True; it must be a whole number"),
        (GenerationOptions(temperature="1"), "temperature is '1'; it must be a number"),  # type: ignore[arg-type]
        (GenerationOptions(stops="ab"), "stops is 'ab'; it must be a sequence of texts"),  # type: ignore[arg-type]
        (GenerationOptions(stops=5), "stops is 5; it must be a sequence of texts"),  # type: ignore[arg-type]
        (GenerationOptions(stops=("\ud800",)), "half a character"),
        (GenerationOptions(preset=["a"]), "preset \\['a'\\] is unknown"),  # type: ignore[arg-type]
        (GenerationOptions(stops=(1,)), "it must be a sequence of texts"),  # type: ignore[arg-type]
        (GenerationOptions(min_tokens=9, max_tokens=8), "min_tokens is 9, more than max_tokens, 8"),
    ],
)
def test_values_out_of_range_are_refused(manifest: Manifest, options: GenerationOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(options, manifest)


def test_beams_take_the_place_of_a_presets_draws_and_that_is_said(manifest: Manifest) -> None:
    chosen = resolve(GenerationOptions(preset="authors", beams=4), manifest)
    assert (chosen.beams, chosen.temperature, chosen.preset) == (4, 0.0, "authors")
    (said,) = undrawn(chosen, manifest)
    assert said.startswith("beam search here draws nothing: the temperature 1.0 of preset 'authors' was not used")
    for quiet in (GenerationOptions(beams=4), GenerationOptions(preset="authors"), None):
        assert undrawn(resolve(quiet, manifest), manifest) == ()
    drawing = replace(manifest, defaults=replace(manifest.defaults, temperature=0.5))
    assert undrawn(resolve(GenerationOptions(beams=2), drawing), drawing)
