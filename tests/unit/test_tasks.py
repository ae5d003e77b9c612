"""Tasks, boxes and replaced words on the whole path: a real engine that says a known answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xraygpt_lite import model as models
from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import UsageError
from xraygpt_lite.model import XrayModel
from xraygpt_lite.values import Box, Segment, TokenSegment

IMAGE = np.random.default_rng(3).integers(0, 256, (200, 100), dtype=np.uint8)  # a step is 1 x 2 pixels
TEXT = "XrayGPT sees the heart and {<1><2>."
RAW = " ChatDoctor sees <p>the heart</p> {<10><20><50><70>}<delim>{<60><0><100><100>} and {<1><2>."
BOXES = (Box("the heart", 10.0, 40.0, 50.0, 140.0), Box("the heart", 60.0, 0.0, 100.0, 200.0))


@pytest.fixture(scope="module")
def model(talking_bundle: Path) -> Iterator[XrayModel]:
    with models.open_bundle(store.load(talking_bundle, Cache(None)), threads=1, context=512) as opened:
        yield opened


def test_an_answer_has_its_boxes_in_pixels_and_reads_without_markup(model: XrayModel) -> None:
    with model.stream(IMAGE) as stream:
        assert "".join(stream) == RAW.lstrip()
    summary = stream.summary
    assert (summary.text, summary.raw_text, summary.boxes) == (TEXT, RAW, BOXES)
    assert (summary.task, summary.asked_box) == (None, None)
    assert ["could not be read" in warning for warning in summary.warnings] == [True]
    assert stream.radiograph.pixels.shape == (200, 100)


def test_every_way_of_asking_sends_and_records_the_same(model: XrayModel, monkeypatch: pytest.MonkeyPatch) -> None:
    box = (10, 20, 30.5, 41)
    asked = model.check(task="identify", box=box)
    assert (asked.question, asked.box) == ("what is this", (10.0, 20.0, 30.5, 41.0))
    summaries = [
        model.summarize(IMAGE, task="identify", box=box),
        model.stream(IMAGE, task="identify", box=box).summary,
    ]
    with model.chat(IMAGE) as chat:
        sent: list[str] = []
        generate = chat._slot.generate

        def noting(segments: Sequence[Segment], *args: Any, **more: Any) -> Any:
            last = segments[-1]
            assert isinstance(last, TokenSegment)
            sent.append(b"".join(map(model._engine._core.model.piece, last.ids.tolist())).decode())
            return generate(segments, *args, **more)

        monkeypatch.setattr(chat._slot, "generate", noting)
        summaries.append(chat.ask(task="identify", box=box))
        chat.ask("large?", task="vqa")
        assert chat.ask("[vqa] large?").question == "[vqa] large?"
    assert sent == [
        " </Img> [identify] what is this {<10><10><30><20>}###Doctor:",
        "###Patient: [vqa] large?###Doctor:",
        "###Patient: [vqa] large?###Doctor:",
    ]
    for summary in summaries:
        assert (summary.question, summary.task, summary.asked_box) == ("what is this", "identify", (10, 20, 30.5, 41))
        assert summary.prompt_tokens == summaries[0].prompt_tokens


def test_a_box_outside_the_image_is_refused_and_costs_no_sequence(model: XrayModel) -> None:
    with pytest.raises(UsageError, match="reaches outside the image, which is 100 x 200 pixels"):
        model.summarize(IMAGE, task="identify", box=(0, 0, 101, 200))
    with model.chat(IMAGE) as chat:
        with pytest.raises(UsageError, match="100 x 200"):
            chat.ask(task="identify", box=(0, 0, 100, 201))
        assert not chat._slot.rows


def test_what_no_image_could_satisfy_is_refused_before_it_is_read(model: XrayModel) -> None:
    for words in ({"task": "nope"}, {"task": "vqa"}, {"box": (1, 2, 3, 4)}, {"task": "identify", "box": (2, 2, 1, 3)}):
        with pytest.raises(UsageError):
            model.summarize("no such file", **words)  # type: ignore[arg-type]
