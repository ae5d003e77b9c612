"""Files are found once each, under names that last, in an order that lasts; nothing is dropped without a word."""

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xraygpt_lite.batch.inputs import (
    NO_IMAGES,
    ORDERS,
    Input,
    could_be_radiograph,
    find,
    in_shard,
    matcher,
    parse_shard,
)
from xraygpt_lite.errors import UsageError, XrayError

posix = pytest.mark.skipif(os.name == "nt", reason="needs names and links as POSIX has them")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(*paths: str, text: str = "") -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def names(found: list[Input]) -> list[str]:
    return [item.name for item in found]


def pairs(found: list[Input]) -> list[tuple[str, str]]:
    return [(item.name, item.path.as_posix()) for item in found]


# --- folders ---


def test_a_folder_gives_what_could_be_a_radiograph_in_it_and_below() -> None:
    put("in/b.png", "in/sub/deep/IM0001", "in/sub/1.2.840.113619", "in/a.DCM", "in/odd.xyz")
    put(
        "in/notes.txt",
        "in/T.CSV",
        "in/sub/DICOMDIR",
        "in/x.json",
        "in/.hidden.png",
        "in/.git/x.png",
        "in/out.jsonl.lock",
    )
    assert pairs(find(["in"])) == [
        ("a.DCM", "in/a.DCM"),
        ("b.png", "in/b.png"),
        ("odd.xyz", "in/odd.xyz"),
        ("sub/1.2.840.113619", "in/sub/1.2.840.113619"),
        ("sub/deep/IM0001", "in/sub/deep/IM0001"),
    ]


@pytest.mark.parametrize("extension", sorted(NO_IMAGES))
def test_what_is_left_out_of_a_folder_is_told_beforehand(extension: str) -> None:
    assert not could_be_radiograph(f"a{extension}")
    assert not could_be_radiograph(f"a.png{extension.upper()}")
    assert could_be_radiograph(f"a{extension}.png")
    assert could_be_radiograph(extension[1:])  # a name without extension


@pytest.mark.parametrize("argument", ["in", "in/", "./in", "in/../in", "in/sub/.."])
def test_names_do_not_depend_on_how_a_folder_is_written(here: Path, argument: str) -> None:
    put("in/sub/x.png")
    assert names(find([argument])) == names(find([here / "in"])) == ["sub/x.png"]


def test_the_working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    put("in/a.png")
    monkeypatch.chdir("in")
    assert pairs(find(["."])) == [("a.png", "a.png")]
    put("../other/b.png")
    assert names(find([".", "../other"])) == ["in/a.png", "other/b.png"]


def test_several_folders_put_their_own_name_first() -> None:
    put("one/a/x.png", "two/a/x.png", "a-2/x.png", "three/a/x.png", "b/x.png")
    arguments = ["one/a", "two/a", "a-2", "three/a", "b"]
    assert pairs(find(arguments, order="given")) == [
        ("a/x.png", "one/a/x.png"),
        ("a-2/x.png", "two/a/x.png"),
        ("a-2-2/x.png", "a-2/x.png"),
        ("a-3/x.png", "three/a/x.png"),
        ("b/x.png", "b/x.png"),
    ]


def test_the_same_folder_twice_is_one_folder() -> None:
    put("in/x.png")
    assert names(find(["in", "./in", "in/"])) == ["x.png"]


def test_a_folder_below_another_one_adds_nothing() -> None:
    put("in/sub/x.png", "in/y.png")
    assert names(find(["in", "in/sub"])) == ["in/sub/x.png", "in/y.png"]
    assert names(find(["in/sub", "in"])) == ["in/y.png", "sub/x.png"]


def test_equal_contents_are_two_inputs() -> None:
    put("in/x.png", "in/y.png", text="same")
    os.link("in/x.png", "in/z.png")
    assert names(find(["in"])) == ["x.png", "y.png", "z.png"]


@posix
def test_links_to_files_are_followed_and_links_to_folders_are_not() -> None:
    put("in/real/x.png", "away/y.png", "away/z.png")
    os.symlink("..", "in/real/loop")
    os.symlink("../away", "in/linked")
    os.symlink("../away/y.png", "in/y-link.png")
    assert names(find(["in"])) == ["real/x.png", "y-link.png"]
    assert names(find(["in/linked"])) == ["y.png", "z.png"]  # a link that is named is meant


@posix
def test_a_file_and_a_link_to_it_are_one_input_under_the_first_name() -> None:
    put("in/m.png", "in/sub/n.png")
    os.symlink("m.png", "in/z.png")
    os.symlink("sub/n.png", "in/a.png")
    assert names(find(["in"], order="given")) == ["a.png", "m.png"]
    assert names(find(["in/z.png", "in"])) == ["a.png", "in/z.png"]


@posix
def test_a_link_that_leads_nowhere_is_taken_so_that_it_fails_in_sight() -> None:
    put("in/x.png")
    os.symlink("absent.png", "in/broken.png")
    os.symlink("self.png", "in/self.png")
    assert names(find(["in"])) == ["broken.png", "self.png", "x.png"]


@posix
def test_pipes_and_devices_are_no_files_of_a_folder() -> None:
    put("in/x.png")
    os.mkfifo("in/pipe")
    os.symlink("/dev/zero", "in/zero")
    assert names(find(["in"])) == ["x.png"]


@posix
def test_folders_nested_deeper_than_python_recurses() -> None:
    depth = sys.getrecursionlimit() + 200  # "d/" each, within what a path may have
    try:
        for number in range(1, depth + 1):
            os.mkdir("d/" * number)
        os.close(os.open("d/" * depth + "x.png", os.O_CREAT))
        assert names(find(["."])) == ["d/" * depth + "x.png"]
    finally:  # pytest, which clears up after itself by recursion, could not
        subprocess.run(["rm", "-r", "d"], check=True)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)


@posix
def test_a_folder_that_cannot_be_read_is_an_error_not_an_omission(here: Path) -> None:
    put("in/x.png", "in/sub/locked/y.png", "list.txt")
    locked = Path("in/sub/locked")
    here.chmod(0o755)
    locked.chmod(0)
    Path("list.txt").chmod(0)
    message = "cannot be read .Permission denied.. Check it and its permissions"
    try:
        with as_nobody():
            for arguments in (["in"], ["in/**/*.png"], ["in/x.png", "in/sub/locked"]):
                with pytest.raises(XrayError, match=f"^in/sub/locked/?: {message}") as caught:
                    find(arguments)
                assert caught.value.exit_code == 1
            with pytest.raises(XrayError, match=f"^in/sub/locked/y.png: {message}"):
                find(["in/sub/locked/y.png"])
            with pytest.raises(XrayError, match=f"^list.txt: {message}"):
                find(["list.txt"])
            assert names(find(["in/*.png"])) == ["in/x.png"]  # does not look there
    finally:
        locked.chmod(0o755)


# --- files and patterns ---


def test_a_named_file_is_taken_whatever_it_is() -> None:
    put("in/x.png", "in/report.pdf", "in/.hidden", "in/DICOMDIR")
    assert names(find(["in/report.pdf", "./in//x.png", "in/.hidden", "in/DICOMDIR"], order="given")) == [
        "in/report.pdf",
        "in/x.png",
        "in/.hidden",
        "in/DICOMDIR",
    ]


def test_a_file_is_one_input_however_often_it_is_named(here: Path) -> None:
    put("in/x.png", "in/y.png", "list.txt", text="in/x.png/\n./in/x.png/.\nin/../in/x.png\nin/y.png\n")
    arguments = ["in/x.png", here / "in" / "x.png", "in", "in/*", "list.txt"]
    assert names(find(arguments)) == ["in/x.png", "y.png"]


def test_two_files_of_one_name_are_kept_apart(here: Path) -> None:
    put("lists/x.png", "in/x.png", "x.png", "in/y.png")
    put("lists/list.txt", text="x.png\n")
    assert pairs(find(["x.png", "in", "lists/list.txt"], order="given")) == [
        ("x.png", "x.png"),
        ((here / "in/x.png").resolve().as_posix(), "in/x.png"),
        ("y.png", "in/y.png"),
        ((here / "lists/x.png").resolve().as_posix(), "lists/x.png"),
    ]


PATTERNS = {
    "in/*.png": ["in/a.png"],
    "in/*": ["in/a.png", "in/b.dcm"],
    "./in/?.[dp]*": ["in/a.png", "in/b.dcm"],
    "in/[!a].*": ["in/b.dcm"],
    "in/**": ["in/a.png", "in/b.dcm", "in/s/a.png", "in/s/t/a.png", "in/u/t/c.png"],
    "in/**/*.png": ["in/a.png", "in/s/a.png", "in/s/t/a.png", "in/u/t/c.png"],
    "in/**/**/a.png": ["in/a.png", "in/s/a.png", "in/s/t/a.png"],
    "**/t/*": ["in/s/t/a.png", "in/u/t/c.png"],
    "**/t/**": ["in/s/t/a.png", "in/u/t/c.png"],
    "in/*/t/a.png": ["in/s/t/a.png"],
    "in/**/a.png": ["in/a.png", "in/s/a.png", "in/s/t/a.png"],
    "in/.h*/*": ["in/.hidden/x.png"],
    "i*/.*.png": ["in/.x.png"],
}


@pytest.mark.parametrize(("pattern", "expected"), PATTERNS.items())
@pytest.mark.parametrize("absolute", [False, True])
def test_patterns(here: Path, pattern: str, expected: list[str], absolute: bool) -> None:
    put(
        "in/a.png",
        "in/b.dcm",
        "in/s/a.png",
        "in/s/t/a.png",
        "in/u/t/c.png",
        "in/n.txt",
        "in/.x.png",
        "in/.hidden/x.png",
    )
    prefix = here.as_posix() + "/" if absolute else ""
    assert pairs(find([prefix + pattern])) == [(prefix + name, prefix + name) for name in expected]


@posix
@pytest.mark.parametrize("links", [1, 12])
def test_a_pattern_does_not_run_in_circles(links: int) -> None:
    put("in/s/x.png")
    for number in range(links):
        os.symlink("..", f"in/s/loop{number}")
    assert names(find(["in/**/**/*.png"])) == ["in/s/x.png"]


def test_a_pattern_looks_once_into_each_folder_for_each_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    put("a/" * 30 + "x.png")
    scans: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: scans.append(folder) or scandir(folder))
    pattern = "**/a/**/a/**/a/**/*.png"
    assert names(find([pattern])) == ["a/" * 30 + "x.png"]
    assert len(scans) <= 31 * len(pattern.split("/"))


@posix
def test_a_path_that_exists_is_no_pattern() -> None:
    put("in/x[1].png", "in/x1.png", "study [3]/a.png", "study 3/b.png", "study [3]/[b]/*.png", "*")
    assert names(find(["in/x[1].png"])) == ["in/x[1].png"]
    assert names(find(["study [3]/?.png"])) == ["study [3]/a.png"]
    assert names(find(["study [3]/[b]/*.png"])) == ["study [3]/[b]/*.png"]
    assert names(find(["*"])) == ["*"]


@pytest.mark.parametrize("pattern", ["in/*.dcm", "nowhere/*", "in/x.png/*", "in/*.txt", "[", "*" * 300])
def test_a_pattern_without_a_match(pattern: str) -> None:
    put("in/x.png", "in/n.txt")
    with pytest.raises(UsageError) as caught:
        find(["in/x.png", pattern])
    assert str(caught.value) == f"{pattern}: neither a path nor a pattern of files that could be radiographs. Check it."


@pytest.mark.parametrize("argument", ["absent", "in/x.png/below", "a" * 300])
def test_an_argument_that_names_nothing(argument: str) -> None:
    put("in/x.png")
    with pytest.raises(UsageError) as caught:
        find(["in", argument])
    assert str(caught.value) == f"{argument}: there is no such file or folder. Check the path."


def test_an_argument_that_cannot_be_a_path() -> None:
    for argument in ("in\0", "\ud800"):
        with pytest.raises(UsageError, match=r"^an argument holds a character that no path can hold"):
            find([argument])
    with pytest.raises(UsageError, match=r"^'': there is no such file"):
        find([""])


# --- lists ---


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_list(here: Path, bom: str, end: str) -> None:
    absolute = (here / "in" / "b.png").as_posix()
    lines = [
        "# radiographs",
        "a.png",
        "",
        "  ",
        "../lists/sub/ü x .png",
        absolute,
        "absent.png",
        "#no.png",
        "./#yes.png",
    ]
    Path("lists").mkdir()
    Path("lists/all.TXT").write_bytes((bom + end.join(lines)).encode())
    assert pairs(find(["lists/all.TXT"], order="given")) == [
        ("a.png", "lists/a.png"),
        ("../lists/sub/ü x .png", "lists/../lists/sub/ü x .png"),
        (absolute, absolute),
        ("absent.png", "lists/absent.png"),
        ("#yes.png", "lists/#yes.png"),
    ]


CSV = {
    "path": "path\na.png\nb,c\n",
    "file": "id, File \r\n7,a.png\r\n8,b\r\n",
    "both": 'file,path\nx,a.png\n\n,\ny,"b"\n',
    "bom": "\ufeffpath,age\na.png,7\nb,8",
}


@pytest.mark.parametrize("text", CSV.values(), ids=CSV.keys())
def test_a_csv_list(text: str) -> None:
    Path("lists").mkdir()
    Path("lists/all.csv").write_bytes(text.encode())
    assert pairs(find(["lists/all.csv"])) == [("a.png", "lists/a.png"), ("b", "lists/b")]


def test_a_csv_list_may_quote_any_name() -> None:
    Path("all.csv").write_bytes(b'id,path\n1,"a, ""b""\nc.png"\n2,#x.png\n3,"d\r\ne"\n')
    assert names(find(["all.csv"], order="given")) == ['a, "b"\nc.png', "#x.png", "d\r\ne"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"patient;age\nDoe;7\n",
            "the first line has 1 columns between commas, none titled path or file; a CSV list needs",
        ),
        (b"", "the first line has 0 columns"),
        (b"path,id\na.png,1\n,2\n", "line 3: the column path is empty; expected a path"),
        (b"id,file\n1,a.png\n2\n", "line 3: the column file is empty; expected a path"),
        (b'path\n"' + b"x" * 200_000 + b'"\n', "line 2: this is no CSV (field larger than field limit"),
        (b"path\na\0b\n", "line 2: the path holds a character that no path can hold"),
    ],
)
def test_a_csv_list_that_cannot_be_meant(text: bytes, message: str) -> None:
    Path("all.csv").write_bytes(text)
    with pytest.raises(UsageError) as caught:
        find(["all.csv"])
    assert message in str(caught.value)
    assert str(caught.value).startswith("all.csv")
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_a_list_in_another_encoding_is_refused(encoding: str) -> None:
    Path("all.txt").write_bytes("a.png\nb.png\n".encode(encoding))
    with pytest.raises(UsageError, match=r"^all.txt, line 1: the path holds a character that no path can hold"):
        find(["all.txt"])


def test_paths_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    put("in/x.png", "in/list.txt")
    lines = iter(["in/x.png\n", "\n", "#5.png\r\n", "in/x.png\n", "absent", "in/list.txt\n"])
    assert pairs(find(["-"], order="given", stdin=lines)) == [
        ("in/x.png", "in/x.png"),
        ("#5.png", "#5.png"),
        ("absent", "absent"),
        ("in/list.txt", "in/list.txt"),
    ]
    with pytest.raises(UsageError, match=r"^- stands for paths on standard input, and there is none"):
        find(["-"])
    with pytest.raises(UsageError, match=r"^standard input, line 2: the path holds a character"):
        find(["-"], stdin=["a\n", "b\0c\0"])
    put("-")
    assert names(find(["./-"])) == ["-"]


# --- odd names ---

ODD = [
    b"a\nb.png",
    b"\xff\xfe.png",
    b" lead",
    b"trail ",
    b"#5.png",
    b"back\\slash",
    b'quo"te,',
    b"*",
    "ü".encode(),
    b"~",
    b"\r",
]


@posix
@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse names that are no UTF-8")
def test_odd_names_survive() -> None:
    os.makedirs(b"in/\xe9")
    for name, folder in product(ODD, (b"in/", b"in/\xe9/")):
        with open(folder + name, "wb") as file:
            file.write(name)
    found = find(["in"], order="random")
    assert {os.fsencode(item.name) for item in found} == {*ODD, *(b"\xe9/" + name for name in ODD)}
    for item in found:
        assert item.path.read_bytes() == os.fsencode(Path(item.name).name)
        assert [i.path for i in find(["in/" + item.name])] == [item.path]
    Path("all.txt").write_bytes(
        b"".join(b"./in/" + name + b"\n" for name in ODD if name != b"\r" and b"\n" not in name)
    )
    assert all(item.path.exists() for item in find(["all.txt"]))
    for order in ORDERS:
        assert len(find(["in/**"], order=order, shard=(1, 1), exclude=["nothing"])) == len(found)


# --- filters, shards, order ---


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], ["a/x.PNG", "a/y.dcm", "b/x.dcm", "b/x.png"]),
        (["*.dcm"], [], ["a/y.dcm", "b/x.dcm"]),
        (["x.*"], [], ["a/x.PNG", "b/x.dcm", "b/x.png"]),
        (["a/*", "*.png"], [], ["a/x.PNG", "a/y.dcm", "b/x.png"]),
        (["*"], ["b/*"], ["a/x.PNG", "a/y.dcm"]),
        (["*.dcm"], ["y*"], ["b/x.dcm"]),
        ([], ["?/x.*"], ["a/y.dcm"]),
        (["[ab]/x.[pP]*"], ["*.png"], ["a/x.PNG"]),
    ],
)
def test_include_and_exclude(include: list[str], exclude: list[str], expected: list[str]) -> None:
    put("in/a/x.PNG", "in/a/y.dcm", "in/b/x.png", "in/b/x.dcm")
    assert names(find(["in"], include=include, exclude=exclude)) == expected
    assert all(matcher(include, exclude)(name) for name in expected)


def test_filters_do_not_change_names() -> None:
    put("one/a/x.png", "two/a/x.png")
    every = find(["one/a", "two/a", "one/a/x.png"])
    assert names(every) == ["a-2/x.png", "a/x.png"]
    assert find(["one/a", "two/a"], exclude=["a/*"]) == every[:1]


def test_nothing_found_says_what_was_looked_for() -> None:
    put("in/n.txt", "in/.x.png", "x.png", "empty.txt")
    with pytest.raises(UsageError) as caught:
        find(["in"])
    assert str(caught.value) == (
        "no file found in in. Hidden files, linked folders and files that cannot be images by their extension (.txt, "
        ".json, .zip …) are left out of folders; name a file itself to take it."
    )
    with pytest.raises(UsageError, match=r"^no file found in in, empty\.txt, in and 1 more"):
        find(["in", "empty.txt", "in", "in"])
    with pytest.raises(UsageError) as caught:
        find(["x.png"], include=["*.dcm", "*.DCM"], exclude=["y*"])
    assert str(caught.value) == (
        "1 found in x.png, none left by include *.dcm, *.DCM and exclude y*. They are compared with whole names and "
        "last parts, case-sensitive."
    )
    with pytest.raises(UsageError, match=r"none left by include \* and exclude x\*"):
        find(["x.png"], exclude=["x*"])
    with pytest.raises(UsageError, match=r"^no input was given"):
        find([])


@pytest.mark.parametrize(
    ("text", "shard"), [("1/1", (1, 1)), ("3/16", (3, 16)), ("16/16", (16, 16)), ("007/9", (7, 9))]
)
def test_a_shard_is_parsed(text: str, shard: tuple[int, int]) -> None:
    assert parse_shard(text) == shard


@pytest.mark.parametrize(
    "text",
    ["", "3", "3/", "/16", "0/16", "17/16", "0/0", "-1/4", "1/-4", "1.0/2", " 1/2", "1/2\n", "٣/9", "1/" + "9" * 5000],
)
def test_a_shard_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_shard(text)
    assert (
        str(caught.value) == f"shard {text!r} is not of the form K/N with K from 1 to N; the third of sixteen is 3/16"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "size"}, "order 'size' is unknown; expected one of name, given, newest, oldest, random"),
        ({"limit": 0}, "limit is 0; expected 1 or more"),
        ({"shard": (0, 4)}, "shard '0/4' is not of the form K/N with K from 1 to N; the third of sixteen is 3/16"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    put("x.png")
    with pytest.raises(UsageError) as caught:
        find(["x.png"], **options)  # type: ignore[arg-type]
    assert str(caught.value) == message


characters = st.characters(codec="utf-8", exclude_characters="\0\n\r/") | st.sampled_from("\udc80\udcff0159.# ")
paths = st.text(characters, min_size=1).filter(lambda text: bool(text.strip(". ")) and bool(text.strip()))


def listed(lines: list[str], **options: object) -> list[str]:
    return names(find(["-"], stdin=lines, **options))  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(paths, min_size=1, max_size=12, unique=True), st.integers(1, 12))
def test_shards_part_the_inputs_exactly(lines: list[str], parts: int) -> None:
    every = listed(lines)
    shards = [listed(lines, shard=(number, parts)) for number in range(1, parts + 1)]
    assert sorted(name for shard in shards for name in shard) == sorted(every)
    for name in every:  # alone as among others
        shard = next(number for number in range(1, parts + 1) if name in shards[number - 1])
        assert listed(["./" + name], shard=(shard, parts)) == [name]
        assert in_shard(name, (shard, parts))


def test_shards_are_what_the_documents_say_and_even() -> None:
    number = int.from_bytes(hashlib.sha256("ü/x.png".encode()).digest()[:8], "big") % 16 + 1
    assert in_shard("ü/x.png", (number, 16))
    lines = [f"patient{number:05}/IM1" for number in range(8000)]
    sizes = [sum(in_shard(line, (number, 16)) for line in lines) for number in range(1, 17)]
    assert sum(sizes) == 8000
    assert min(sizes) > 400
    assert max(sizes) < 600


def test_a_shard_of_few_inputs_may_be_empty() -> None:
    assert sorted(len(listed(["x"], shard=(number, 3))) for number in (1, 2, 3)) == [0, 0, 1]


@settings(deadline=None)
@given(st.lists(paths, min_size=1, max_size=12, unique=True), st.sampled_from(ORDERS), st.randoms(), st.integers(1, 5))
def test_an_order_is_a_permutation_that_does_not_depend_on_the_arguments(
    lines: list[str], order: str, chance: random.Random, limit: int
) -> None:
    given_order = listed(lines, order="given")
    ordered = listed(lines, order=order)
    assert sorted(ordered) == sorted(given_order)
    assert listed(lines, order=order, limit=limit) == ordered[:limit]
    if order != "given":
        mixed = list(lines)
        chance.shuffle(mixed)
        assert listed(mixed, order=order) == ordered


def test_numbers_in_names_count_by_value() -> None:
    expected = [
        "IMG3",
        "a b/1",
        "a-1",
        "a/1",
        "a/9/z",
        "a/10/b",
        "img",
        "img0",
        "img01",
        "img1",
        "img1b",
        "img2",
        "img10",
    ]
    expected += [
        "img10a",
        "img999999999999999999999",
        "img1000000000000000000000",
        "imgb1",
        "imgb٣",
        "x1y2",
        "x1y10",
        "x2y1",
    ]
    assert listed(random.Random(1).sample(expected, len(expected))) == expected
    for lines in permutations(["a1", "a01", "a001"]):
        assert listed(list(lines)) == ["a001", "a01", "a1"]
    assert listed(["9" * 6000, "1" + "0" * 6000, "2"]) == ["2", "9" * 6000, "1" + "0" * 6000]


def test_orders_by_time() -> None:
    put(
        "in/b10.png",
        "in/b9.png",
        "in/c.png",
        "in/a.png",
        "list.txt",
        text="in/b9.png\nin/gone\nin/b10.png\nin/a.png\nin/c.png",
    )
    for name, when in {"b10.png": 5, "b9.png": 5, "c.png": 9, "a.png": 7}.items():
        os.utime(f"in/{name}", ns=(0, when))
    assert names(find(["in"], order="oldest")) == ["b9.png", "b10.png", "a.png", "c.png"]
    assert names(find(["in"], order="newest")) == ["c.png", "a.png", "b9.png", "b10.png"]
    assert names(find(["in"], order="newest", limit=1)) == ["c.png"]
    assert names(find(["list.txt"], order="oldest"))[-1] == names(find(["list.txt"], order="newest"))[-1] == "in/gone"


def test_given_is_the_order_of_the_arguments() -> None:
    put("b/za", "b/10.png", "b/9.png", "b/t/a", "b/s/a.png", "b/s/r/a", "b/az", "a/x.png", "f.png")
    assert names(find(["f.png", "b", "a"], order="given")) == [
        "f.png",
        "b/10.png",
        "b/9.png",
        "b/az",
        "b/za",
        "b/s/a.png",
        "b/s/r/a",
        "b/t/a",
        "a/x.png",
    ]
    assert names(find(["b/**"], order="given")) == names(find(["f.png", "b", "a"], order="given"))[1:-1]


def test_a_random_sample_is_fair_and_lasts() -> None:
    lines = [f"{'old' if number < 2000 else 'new'}/{number:05}" for number in range(4000)]
    sample = listed(lines, order="random", limit=600)
    assert 250 < sum(name.startswith("old") for name in sample) < 350
    assert [name for name in listed(lines[:3000], order="random") if name in sample] == [
        name for name in sample if int(name[4:]) < 3000
    ]
    shard = listed(lines, order="random", shard=(2, 4), limit=250)
    assert shard == [name for name in listed(lines, order="random") if in_shard(name, (2, 4))][:250]


def test_many_files_are_found_without_looking_each_of_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in range(100):
        os.makedirs(f"in/{folder:03}/series")
        for number in range(200):
            os.close(os.open(f"in/{folder:03}/series/IM{number}", os.O_CREAT))
    looked_up: list[str] = []
    for call in (os.stat, os.lstat):

        def counted(path: str, call: Callable[..., Any] = call, **options: Any) -> Any:
            looked_up.append(path)
            return call(path, **options)

        monkeypatch.setattr(os, call.__name__, counted)
    found = find(["in", "in/007"])
    assert len(looked_up) < 100
    expected = {f"in/{folder:03}/series/IM{number}" for folder in range(100) for number in range(200)}
    assert len(found) == 20_000
    assert {item.path.as_posix() for item in found} == {item.name for item in found} == expected
    assert {item.name for item in find(["in/**/IM*"])} == expected
