"""Boxes as text: what models write is read or kept, never an error; pixels survive the way there and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xraygpt_lite import boxes
from xraygpt_lite.errors import UsageError
from xraygpt_lite.imaging.transform import transform
from xraygpt_lite.values import Box, Fit, ImageSpec, Placement, Radiograph

SIDE, GRID = 448, 100
WHOLE = Placement((SIDE / 1000, SIDE / 500), (0.0, 0.0), (1000, 500))  # stretched: a step is 10 x 5 pixels
HEART = "{<10><20><30><40>}"
PIECES = ["<p>", "</p>", "<delim>", "{", "}", "<", ">", HEART, "{<5>", "<101>", "0", "heart", " ", "\n", ".", "²", "心"]


def parse(text: str) -> boxes.Reading:
    return boxes.parse(text, WHOLE, SIDE, GRID)


def box(phrase: str, *steps: int) -> Box:
    return Box(phrase, steps[0] * 10.0, steps[1] * 5.0, steps[2] * 10.0, steps[3] * 5.0)


@pytest.mark.parametrize(
    ("raw", "text", "found"),
    [
        ("no box", "no box", []),
        (HEART, "", [box("", 10, 20, 30, 40)]),
        ("{<0><0><100><100>}", "", [box("", 0, 0, 100, 100)]),
        (f"<p>the  heart</p> {HEART}", "the heart", [box("the heart", 10, 20, 30, 40)]),
        (f"{HEART}<delim>{{<1><2><3><4>}}", "", [box("", 10, 20, 30, 40), box("", 1, 2, 3, 4)]),
        (
            f"<p>lungs</p>{HEART}<delim>{{<1><2><3><4>}} are clear, <p>heart</p> {{<5><6><7><8>}}.",
            "lungs are clear, heart.",
            [box("lungs", 10, 20, 30, 40), box("lungs", 1, 2, 3, 4), box("heart", 5, 6, 7, 8)],
        ),
        (f"<p>lungs</p> {HEART} {{<1><2><3><4>}}", "lungs", [box("lungs", 10, 20, 30, 40), box("lungs", 1, 2, 3, 4)]),
        (f"It is here {HEART} , and large", "It is here, and large", [box("", 10, 20, 30, 40)]),
        (f"here{HEART}there", "here there", [box("", 10, 20, 30, 40)]),
        (f"one {HEART}\ntwo", "one\ntwo", [box("", 10, 20, 30, 40)]),
        (f"({HEART})", "()", [box("", 10, 20, 30, 40)]),
        ("a <p>heart</p> alone", "a heart alone", []),
    ],
)
def test_boxes_are_read_and_their_markup_leaves_the_text(raw: str, text: str, found: list[Box]) -> None:
    assert parse(raw) == boxes.Reading(text, tuple(found), ())


@pytest.mark.parametrize(
    ("raw", "text", "found"),
    [
        ("{<10><20><30>}", "{<10><20><30>}", 0),
        ("{<10><20><30><40", "{<10><20><30><40", 0),
        ("at {<10><20><30><40> end", "at {<10><20><30><40> end", 0),
        ("{<10><20><30><101>}", "{<10><20><30><101>}", 0),
        ("{<30><20><30><40>}", "{<30><20><30><40>}", 0),
        ("{<10><40><30><20>}", "{<10><40><30><20>}", 0),
        ("{<-1><20><30><40>}", "{<-1><20><30><40>}", 0),
        ("{<1.5><20><30><40>}", "{<1.5><20><30><40>}", 0),
        ("{<9999999><20><30><40>}", "{<9999999><20><30><40>}", 0),
        ("{<١><٢><٣><٤>}", "{<١><٢><٣><٤>}", 0),
        (f"<p>heart {HEART}", "<p>heart", 1),
        (f"{HEART}<delim>", "<delim>", 1),
        (f"<p>heart</p> {HEART}<delim>{{<1><1><1><1>}} big", "heart {<1><1><1><1>} big", 1),
        (f"a {{<1><2> b {HEART}", "a {<1><2> b", 1),
    ],
)
def test_what_is_no_box_stays_as_written_with_one_warning(raw: str, text: str, found: int) -> None:
    read = parse(raw)
    assert (read.text, len(read.boxes)) == (text, found)
    (warning,) = read.warnings
    assert "could not be read" in warning
    assert not any(character.isdigit() for character in warning)  # nothing of the answer


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)), st.integers(1, 10_000))
def test_any_text_is_read(text: str, grid: int) -> None:
    read = boxes.parse(text, WHOLE, SIDE, grid)
    for one in read.boxes:
        assert 0 <= one.x0 < one.x1 <= 1000
        assert 0 <= one.y0 < one.y1 <= 500
    if not {"<", ">"} & set(text):
        assert read == boxes.Reading(text.strip(), (), ())


def placed(width: int, height: int, fit: Fit, side: int) -> Placement:
    spec = ImageSpec(side, fit, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return transform([Radiograph(np.zeros((height, width), np.float32), "array", "")], spec).placements[0]


@settings(deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from(["stretch", "pad"]),
    st.integers(8, 64),
    st.integers(1, 200),
    st.tuples(*[st.integers(0, 5000)] * 4),
)
def test_a_box_comes_back_within_one_step(
    width: int, height: int, fit: Fit, side: int, grid: int, parts: tuple[int, ...]
) -> None:
    (x0, x1), (y0, y1) = sorted(parts[:2]), sorted(parts[2:])
    asked = (x0 * width / 5000, y0 * height / 5000, x1 * width / 5000, y1 * height / 5000)
    if not (asked[0] < asked[2] and asked[1] < asked[3]):
        return
    placement = placed(width, height, fit, side)
    read = boxes.parse(boxes.markup(boxes.corners(asked), placement, side, grid), placement, side, grid)
    assert (read.text, read.warnings) == ("", ())
    (found,) = read.boxes
    for got, wanted, scale in zip((found.x0, found.y0, found.x1, found.y1), asked, placement.scale * 2, strict=True):
        assert abs(got - wanted) <= side / grid / scale * (1 + 1e-5)


@pytest.mark.parametrize("width", [7, 100, 333, 1000, 1024, 2991])
def test_coordinates_are_truncated_not_rounded_and_no_step_is_lost_to_arithmetic(width: int) -> None:
    placement = placed(width, 10, "stretch", SIDE)
    for x in range(width):
        low = min(x * GRID // width, GRID - 1)
        assert boxes.markup((x, 0, width, 10), placement, SIDE, GRID) == f"{{<{low}><0><100><100>}}"


def test_padding_moves_a_box_and_a_box_in_the_padding_is_off_the_image() -> None:
    placement = placed(50, 100, "pad", 100)  # 25 columns of padding on either side
    assert boxes.markup((0.0, 0.0, 50.0, 100.0), placement, 100, 100) == "{<25><0><75><100>}"
    read = boxes.parse("{<0><0><50><50>} {<0><0><25><50>}", placement, 100, 100)
    assert read.boxes == (Box("", 0.0, 0.0, 25.0, 50.0),)
    assert read.text == "{<0><0><25><50>}"
    assert read.warnings


def test_what_is_thinner_than_a_step_becomes_one_step_wide() -> None:
    assert boxes.markup((999.5, 0.0, 1000.0, 1.0), WHOLE, SIDE, GRID) == "{<99><0><100><1>}"


def test_a_box_outside_the_image_is_refused_with_the_images_size() -> None:
    with pytest.raises(UsageError, match=r"box 0,0,1000\.5,500 reaches outside the image, which is 1000 x 500 pixels"):
        boxes.markup((0, 0, 1000.5, 500), WHOLE, SIDE, GRID)


@pytest.mark.parametrize("given", [(1, 2, 3), (1, 2, 3, 4, 5), "1234x", ("1", "2", "3", ""), (1, 2, 3, None), 7])
def test_corners_need_four_numbers(given: object) -> None:
    with pytest.raises(UsageError, match="needs four numbers, X0,Y0,X1,Y1, in pixels"):
        boxes.corners(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", [(3, 2, 3, 4), (1, 5, 3, 4), (-1, 2, 3, 4), (0, 0, float("nan"), 4), (0, 0, 1, "inf")]
)
def test_corners_need_something_between_them(given: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="holds nothing; expected 0 <= X0 < X1"):
        boxes.corners(given)


def test_corners_are_floats_whatever_they_were() -> None:
    assert boxes.corners(["1", " 2", "3.5", "4e1"]) == boxes.corners(np.array([1, 2, 3.5, 40])) == (1.0, 2.0, 3.5, 40.0)
