"""`report` over real journals: formats, where it writes, pictures of files that are still there and no others."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image

from xraygpt_lite.batch.journal import Entry, Header, Keys
from xraygpt_lite.values import Failure, Record, Sampling, Summary, Timings

Invoke = Callable[..., Result]
HEADER = Header("f" * 64, "tiny", {"questions": ["Normal?"], "identifiers": True}, 3, None, "Research only.", "1")
KEYS = Keys(None)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder archive with a.png and b.png, which differ; beside it out.jsonl about them and a third file."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "archive"
    folder.mkdir()
    for name, grey in (("a.png", 40), ("b.png", 80)):
        Image.new("L", (64, 48), grey).save(folder / name)
    write(tmp_path / "out.jsonl", *(summary(folder / name) for name in ("a.png", "b.png")), failure(folder / "c.png"))
    return folder


def summary(file: Path) -> Summary:
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Summary(
        source=str(file), sha256=sha256, sop_instance_uid=None, question="Normal?", prompt_variant="demo",
        text=f"About {file.name}.", raw_text="", finish="stop", warnings=(), options=Sampling(), device="cpu",
        bundle_id="f" * 64, bundle_name="tiny", timings=Timings(), prompt_tokens=1, image_tokens=2, answer_tokens=3,
        disclaimer="Research only.",
    )  # fmt: skip


def failure(file: Path) -> Failure:
    return Failure(str(file), None, "Normal?", "read", "ImageError", f"{file}: there is no such file.")


def write(journal: Path, *records: Record, header: Header = HEADER) -> None:
    names = [Path(record.source).name for record in records]
    entries = (
        Entry(name, KEYS.key(name, record.sha256, record.question), KEYS.file(name, None), record)
        for name, record in zip(names, records, strict=True)
    )
    journal.write_bytes(header.line() + b"".join(entry.line() for entry in entries))


def pictures(page: Path) -> list[str]:
    return re.findall('alt="Radiograph ([^"]*)"', page.read_text("utf-8"))


@pytest.mark.usefixtures("archive")
def test_text_is_the_default(invoke: Invoke) -> None:
    result = invoke("report", "out.jsonl")
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.sub(r"failed\. .*archive/c", "failed. c", result.stdout) == (
        "== a.png ==\nNormal?\nAbout a.png.\n\n== b.png ==\nNormal?\nAbout b.png.\n\n"
        "== c.png ==\nNormal?\nNo result: read failed. c.png: there is no such file.\n\nResearch only.\n"
    )


@pytest.mark.usefixtures("archive")
@pytest.mark.parametrize("output", [["--format", "csv"], ["-o", "t.CSV"], ["--format", "csv", "-o", "-"]])
def test_csv(invoke: Invoke, output: list[str]) -> None:
    result = invoke("report", "out.jsonl", *output)
    assert result.exit_code == 0
    data = Path("t.CSV").read_bytes() if "t.CSV" in output else result.stdout_bytes
    assert data.count(b"\r\n") == 4
    rows = csv.DictReader(io.StringIO(data.decode(), newline=""))
    assert [(row["input"], row["status"]) for row in rows] == [
        ("a.png", "summary"), ("b.png", "summary"), ("c.png", "failure"),
    ]  # fmt: skip


def test_a_page_with_the_pictures_that_can_be_found(invoke: Invoke, archive: Path) -> None:
    result = invoke("report", "out.jsonl", "-o", "page.html")
    assert (result.exit_code, result.output) == (0, "")
    page = Path("page.html")
    assert pictures(page) == ["a.png", "b.png"]
    assert not list(Path().glob(".*"))
    assert invoke("report", "out.jsonl", "--format", "html").stdout == page.read_text("utf-8")

    moved = archive.rename("moved")
    result = invoke("report", "out.jsonl", "-o", "none.html")
    assert pictures(Path("none.html")) == []
    assert "warning: 2 of 2 radiographs have no picture in the page" in result.stderr
    assert "--root" in result.stderr
    invoke("report", "out.jsonl", "-o", "again.html", "--root", "gone", "--root", str(moved))
    assert Path("again.html").read_text("utf-8") == page.read_text("utf-8")
    result = invoke("report", "out.jsonl", "-o", "bare.html", "--no-thumbnails", "--root", str(moved))
    assert (pictures(Path("bare.html")), result.stderr) == ([], "")


def test_no_picture_of_another_content(invoke: Invoke, archive: Path) -> None:
    Image.new("L", (64, 48), 200).save(archive / "b.png")
    result = invoke("report", "out.jsonl", "-o", "page.html")
    assert pictures(Path("page.html")) == ["a.png"]
    assert "1 of 2 radiographs have no picture" in result.stderr


def test_a_file_of_another_content_is_not_decoded(
    invoke: Invoke, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xraygpt_lite.imaging import read

    decoded: list[object] = []
    decode = read.decode
    monkeypatch.setattr(read, "decode", lambda *given: decoded.append(given[1]) or decode(*given))
    (archive / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nnobody knows")
    invoke("report", "out.jsonl", "-o", "page.html")
    assert [Path(str(path)).name for path in decoded] == ["a.png"]


def test_a_page_that_is_replaced_keeps_its_permissions(invoke: Invoke, archive: Path) -> None:
    Path("page.html").touch(0o600)
    invoke("report", "out.jsonl", "-o", "page.html")
    assert Path("page.html").stat().st_mode & 0o777 == 0o600


def test_what_a_run_could_not_decode_is_not_tried_again(invoke: Invoke, archive: Path) -> None:
    """It may have killed the decoder. This one is a good picture, so that trying would show."""
    about = summary(archive / "a.png")
    records = [
        Failure(about.source, about.sha256, "Normal?", stage, "ImageError", "no") for stage in ("read", "decode")
    ]
    write(Path("bad.jsonl"), records[0])
    write(Path("worse.jsonl"), records[1])
    write(Path("later.jsonl"), replace(records[0], stage="generate"))
    found = []
    for name in ("bad", "worse", "later"):
        result = invoke("report", f"{name}.jsonl", "-o", f"{name}.html")
        assert result.stderr == ""
        found.append(pictures(Path(f"{name}.html")))
    assert found == [[], [], ["a.png"]]


def test_a_run_without_names_has_no_pictures_and_no_digests(invoke: Invoke, archive: Path) -> None:
    header = replace(HEADER, options={**HEADER.options, "identifiers": False}, salt="0" * 16)
    write(Path("out.jsonl"), summary(archive / "a.png"), header=header)
    result = invoke("report", "out.jsonl", "-o", "page.html", "--root", "archive")
    assert (result.exit_code, result.stderr) == (0, "")
    assert pictures(Path("page.html")) == []
    assert summary(archive / "a.png").sha256 not in Path("page.html").read_text("utf-8")


@pytest.mark.usefixtures("archive")
@pytest.mark.parametrize(
    ("args", "code", "stderr"),
    [
        (["gone.jsonl"], 2, "'gone.jsonl' does not exist"),
        (["archive"], 2, "is a directory"),
        (["archive/a.png"], 2, "archive/a.png is no journal of this program"),
        (["out.jsonl", "--format", "pdf"], 2, "'pdf' is not one of 'text', 'csv', 'html'"),
        (["out.jsonl", "-o", "out.jsonl"], 2, "-o out.jsonl is the journal that is read"),
        (["out.jsonl", "-o", "archive"], 2, "-o archive is not a regular file"),
        (["out.jsonl", "-o", "gone/page.html"], 2, "-o gone/page.html cannot be written"),
    ],
)
def test_what_cannot_be_meant(invoke: Invoke, args: list[str], code: int, stderr: str) -> None:
    before = Path("out.jsonl").read_bytes()
    result = invoke("report", *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert stderr in result.stderr
    assert Path("out.jsonl").read_bytes() == before


@pytest.mark.usefixtures("archive")
def test_a_damaged_journal_leaves_the_old_report(invoke: Invoke) -> None:
    Path("page.csv").write_text("old")
    lines = Path("out.jsonl").read_bytes().splitlines(keepends=True)
    Path("out.jsonl").write_bytes(b"".join([*lines[:2], b"{}\n", *lines[3:]]))
    result = invoke("report", "out.jsonl", "-o", "page.csv")
    assert result.exit_code == 1
    assert "line 3 is damaged" in result.stderr
    assert Path("page.csv").read_text() == "old"
    assert not list(Path().glob(".*"))
