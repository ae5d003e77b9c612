"""What other programs take of the processors is seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xraygpt_lite.processors import Others


def write(stat: Path, *shares: int) -> None:
    """A hundred seconds of the processors; shares are user nice system idle iowait irq softirq steal."""
    ticks = [os.sysconf("SC_CLK_TCK") * share for share in shares]
    stat.write_text(f"cpu {' '.join(map(str, ticks))} 0 0\ncpu0 {'9 ' * 10}\n")


@pytest.fixture
def stat(tmp_path: Path) -> Path:
    path = tmp_path / "stat"
    write(path, 0, 0, 0, 0, 0, 0, 0, 0)
    return path


def test_the_work_of_others_is_seen(stat: Path) -> None:
    others = Others(stat)
    assert others.share == 0
    write(stat, 10, 5, 3, 60, 12, 1, 2, 7)  # 72 of 100 idle or waiting for a disk
    assert others.share == pytest.approx(0.28, abs=0.005)  # this process's own seconds hardly count


def test_nothing_is_known_where_the_system_does_not_tell(tmp_path: Path) -> None:
    others = Others(tmp_path / "none")
    assert others.share is None
    assert not others.in_the_way(4)


def test_only_those_who_leave_too_few_processors_are_in_the_way(stat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    others = Others(stat)
    write(stat, 50, 0, 0, 50, 0, 0, 0, 0)  # five of ten processors
    assert [others.in_the_way(threads) for threads in (4, 5, 6, 10)] == [False, False, True, True]
