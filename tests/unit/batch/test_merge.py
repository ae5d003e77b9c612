"""Journals joined: every record once, what is missing said, what does not belong together refused."""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from unit.batch.journal_child import entry, fill_in, header

from xraygpt_lite.batch.journal import Header, Journal, Keys, read
from xraygpt_lite.batch.merge import Merged, merge
from xraygpt_lite.errors import UsageError, XrayError
from xraygpt_lite.values import Failure, Summary


def shard(number: int, of: int = 3, inputs: int | None = 4, **options: Any) -> Header:
    return replace(header(inputs, **options), shard=(number, of))


def journal(path: Path, head: Header, records: Sequence[int], failed: Sequence[int] = ()) -> Path:
    with Journal(path, head) as made:
        for n in records:
            made.append(entry(n, failed=n in failed, keys=made.keys))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "all.jsonl"


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [
        journal(tmp_path / f"{number}.jsonl", shard(number), range(4 * number, 4 * number + 4), [4 * number])
        for number in (1, 2, 3)
    ]


def names(path: Path) -> list[str]:
    return [held.input for held in read(path)[1]]


def test_shards_become_one_journal_that_a_run_can_go_on_with(shards: list[Path], out: Path) -> None:
    assert merge(shards, out) == Merged(records=12, failures=3, gaps=(), overlaps=0)
    found, entries = read(out)
    assert found == header(12)
    assert list(entries) == [entry(n, failed=n % 4 == 0) for n in range(4, 16)]
    lines = [line for path in shards for line in path.read_bytes().splitlines(keepends=True)[1:]]
    assert out.read_bytes() == b"".join([found.line(), *lines])
    with Journal(out, header(16), retry_failed=True) as one:
        assert (one.records, one.failures) == (9, 0)
        fill_in(one, 16)
    assert sorted(names(out)) == sorted(f"{n}.png" for n in range(16))


def test_what_a_later_version_added_is_kept(tmp_path: Path, out: Path) -> None:
    path = journal(tmp_path / "a.jsonl", header(1), [0])
    head, line = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(head + json.dumps({**json.loads(line), "added": 1}).encode() + b"\n")
    merge([path], out)
    assert out.read_bytes() == path.read_bytes()


def test_of_two_records_the_answer_is_kept_else_the_first(tmp_path: Path, out: Path) -> None:
    a = journal(tmp_path / "a.jsonl", header(4), [0, 1, 2, 3], failed=[0, 1])
    b = journal(tmp_path / "b.jsonl", header(4), [0, 1, 2, 3], failed=[1, 3])
    second = b.read_bytes().replace(b"Clear.", b"Other.").replace(b"is empty", b"is other")
    b.write_bytes(second)
    assert merge([a, b], out) == Merged(records=4, failures=1, gaps=(), overlaps=4)
    said = {held.input: held.record for held in read(out)[1]}
    assert [record.text for record in said.values() if isinstance(record, Summary)] == ["Clear.", "Clear.", "Other."]
    assert [record.message for record in said.values() if isinstance(record, Failure)] == ["1.png is empty"]
    assert names(out) == ["1.png", "2.png", "3.png", "0.png"]
    assert read(out)[0].inputs == 8


def test_a_record_that_stands_twice_in_one_journal(tmp_path: Path, out: Path) -> None:
    path = journal(tmp_path / "a.jsonl", header(2), [0, 1], failed=[0])
    path.write_bytes(path.read_bytes() + entry(0).line() + entry(0).line())
    assert merge([path], out) == Merged(records=2, failures=0, gaps=(), overlaps=2)
    with Journal(out, header(2)) as mended:  # what the refusal of `path` advises
        assert mended.records == 2


def test_missing_shards_are_named(shards: list[Path], out: Path, tmp_path: Path) -> None:
    assert merge(shards[1:2], out).gaps == ("of 3 shards these are missing: 1, 3",)
    many = journal(tmp_path / "many.jsonl", shard(7, 100, inputs=0), [])
    listed = ", ".join(str(number) for number in range(1, 22) if number != 7)
    expected = f"of 100 shards these are missing: {listed} and 79 more"
    assert merge([many], tmp_path / "other.jsonl").gaps == (expected,)


def test_journals_that_were_not_finished_are_named(shards: list[Path], out: Path, tmp_path: Path) -> None:
    short = journal(tmp_path / "short.jsonl", shard(2), [8, 9, 10])
    gap = f"{short}: 3 of 4 records; run its command again to finish it"
    assert merge([shards[0], short, shards[2]], out) == Merged(11, 2, (gap,), 0)
    both = tmp_path / "both.jsonl"
    assert merge([shards[0], short, *shards[1:]], both) == Merged(12, 2, (), 3)  # the shard is whole in another one
    assert read(both)[0].inputs == 12


def test_a_shard_in_two_parts_is_counted_over_both(tmp_path: Path, out: Path) -> None:
    a = journal(tmp_path / "a.jsonl", shard(1, 1), [0, 1])
    b = journal(tmp_path / "b.jsonl", shard(1, 1), [1, 2])
    gap = f"{a} and {b}: 3 of 4 records; run its command again to finish it"
    assert merge([a, b], out) == Merged(3, 0, (gap,), 1)
    c = journal(tmp_path / "c.jsonl", shard(1, 1), [3])
    assert merge([a, b, c], tmp_path / "whole.jsonl") == Merged(4, 0, (), 1)


def test_every_question_is_expected(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, header(2, questions=["?", "and?"])) as made:
        for n, question in ((0, "?"), (0, "and?"), (1, "?")):
            made.append(entry(n, question=question))
    assert merge([path], out).gaps == (f"{path}: 3 of 4 records; run its command again to finish it",)


def test_a_run_that_watched_has_no_end_to_miss(tmp_path: Path, out: Path) -> None:
    a = journal(tmp_path / "a.jsonl", header(None), [0])
    b = journal(tmp_path / "b.jsonl", header(1), [1])
    assert merge([a, b], out) == Merged(2, 0, (), 0)
    assert read(out)[0].inputs is None


def test_what_a_merged_journal_holds_of_the_shards_is_not_known(shards: list[Path], out: Path, tmp_path: Path) -> None:
    merge(shards[:2], out)
    found = merge([out, shards[2]], tmp_path / "more.jsonl")
    assert found == Merged(12, 3, (f"{out} is no shard: which of the 3 shards it holds cannot be told",), 0)
    assert merge([out, *shards], tmp_path / "most.jsonl") == Merged(12, 3, (), 8)


def test_a_torn_last_line_is_passed_over(tmp_path: Path, out: Path) -> None:
    path = journal(tmp_path / "a.jsonl", header(2), [0, 1])
    path.write_bytes(path.read_bytes()[:-9])
    before = path.read_bytes()
    assert merge([path], out).records == 1
    assert path.read_bytes() == before
    assert names(out) == ["0.png"]


class TestRefusals:
    def refused(self, paths: list[Path], out: Path, kind: type[XrayError], message: str) -> None:
        before = out.read_bytes() if out.is_file() else None
        with pytest.raises(kind, match=message):
            merge(paths, out)
        assert (out.read_bytes() if out.is_file() else None) == before
        left = {found.name for found in out.parent.iterdir() if not found.name.endswith(".lock")}
        assert left <= {*(path.name for path in paths), out.name, "0.jsonl.salt", "1.jsonl.salt"}

    def test_differences_are_named(self, tmp_path: Path, out: Path) -> None:
        a = journal(tmp_path / "0.jsonl", header(task=None), [0])
        b = journal(tmp_path / "1.jsonl", replace(header(task="x"), bundle_id="e" * 64), [1])
        together = r"0\.jsonl and .*1\.jsonl do not belong together: "
        bundle = r"bundle is tiny \(f{12}\) and tiny \(e{12}\); "
        self.refused([a, b], out, UsageError, together + bundle + r'task is null and "x"$')

    def test_parts_of_different_wholes(self, tmp_path: Path, out: Path) -> None:
        paths = [
            journal(tmp_path / f"{n}.jsonl", head, [n])
            for n, head in enumerate((header(), shard(1, 3), shard(2, 3), shard(2, 4)))
        ]
        self.refused(paths, out, UsageError, r"1\.jsonl and .*3\.jsonl do not belong .* shards of 3 and of 4$")

    def test_an_output_that_exists(self, shards: list[Path], out: Path) -> None:
        out.write_text("mine")
        self.refused(shards, out, UsageError, r"all\.jsonl exists; choose another output, or remove it first")
        out.unlink()
        self.refused(shards, shards[0], UsageError, r"1\.jsonl exists")
        out.symlink_to("nowhere")
        self.refused(shards, out, UsageError, r"all\.jsonl exists")

    def test_names(self, shards: list[Path], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UsageError, match="no journal was given"):
            merge([], out)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match=r"1\.jsonl is named twice"):
            merge([shards[0], Path("1.jsonl")], out)
        with pytest.raises(XrayError, match=r"gone\.jsonl cannot be read: No such file"):
            merge([*shards, tmp_path / "gone.jsonl"], out)
        with pytest.raises(UsageError, match=r"1\.jsonl\.lock is empty; name a journal"):
            merge([*shards, tmp_path / "1.jsonl.lock"], out)
        assert not out.exists()

    def test_a_damaged_journal(self, tmp_path: Path, out: Path) -> None:
        path = journal(tmp_path / "0.jsonl", header(), [0, 1])
        path.write_bytes(path.read_bytes().replace(b"Clear.", b'Clear."', 1))
        self.refused([path], out, XrayError, r"0\.jsonl, line 2 is damaged")

    def test_an_output_that_a_run_is_making(self, shards: list[Path], out: Path) -> None:
        with Journal(out, header()):
            self.refused(shards, out, XrayError, r"another run is writing .*all\.jsonl")

    def test_a_full_disk(self, shards: list[Path], out: Path) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        try:
            self.refused(shards, out, XrayError, r"all\.jsonl cannot be written: the disk is full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestWithoutNames:
    def test_one_salt_for_all(self, tmp_path: Path, out: Path) -> None:
        salt = b"s" * 32
        paths = []
        for number in (1, 2):
            (tmp_path / f"{number}.jsonl.salt").write_bytes(salt)
            head = shard(number, 2, inputs=2, identifiers=False)
            paths.append(journal(tmp_path / f"{number}.jsonl", head, [2 * number, 2 * number + 1]))
        (tmp_path / "1.jsonl.salt").unlink()
        assert merge(paths, out) == Merged(4, 0, (), 0)
        mine = tmp_path / "all.jsonl.salt"
        assert mine.read_bytes() == salt
        assert stat.S_IMODE(mine.stat().st_mode) == 0o600
        with Journal(out, header(4, identifiers=False)) as whole:
            assert whole.has(entry(4, keys=Keys(salt)).key)
        out.unlink()
        merge(paths, out)  # the salt that lies there is the same
        mine.write_bytes(b"o" * 32)
        out.unlink()
        with pytest.raises(UsageError, match=r"all\.jsonl\.salt is of another journal"):
            merge(paths, out)
        assert mine.read_bytes() == b"o" * 32
        mine.unlink()
        (tmp_path / "2.jsonl.salt").unlink()
        assert merge(paths, out).records == 4  # reports need no salt
        assert not mine.exists()

    def test_two_salts(self, tmp_path: Path, out: Path) -> None:
        paths = [journal(tmp_path / f"{n}.jsonl", shard(n + 1, 2, identifiers=False), [n]) for n in (0, 1)]
        TestRefusals().refused(
            paths, out, UsageError, r"salt is [0-9a-f]{16} and [0-9a-f]{16}; where names are kept out, shards need one"
        )
        assert not os.path.exists(f"{out}.salt")
