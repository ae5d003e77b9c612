"""A first look over a run's records: how many of what, and which of them are about one radiograph.

Knows records and the names of their inputs; no file and no format. A rendering goes over the records a second time, so
that neither they nor the page are ever held at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from xraygpt_lite.values import Failure, Record, Summary

Named = tuple[str, Record]
"""The name of an input, and a record about it."""
_Radiograph = tuple[str, str | None]  # name and content: a file that was replaced between two runs is another one


class Heading(Protocol):
    """What a report says of the run as a whole; a journal's header is one."""

    @property
    def bundle_id(self) -> str: ...
    @property
    def bundle_name(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def inputs(self) -> int | None: ...
    @property
    def shard(self) -> tuple[int, int] | None: ...
    @property
    def disclaimer(self) -> str: ...
    @property
    def version(self) -> str: ...


@dataclass(frozen=True)
class Survey:
    """Counts of a run's records.

    Attributes
    ----------
    summaries, failures
        Records of each kind.
    warned
        Summaries that carry a warning.
    findings
        Names of the findings in the summaries, each once, as they first appear.
    answers
        (input, sha256) → how many records are about that radiograph.
    """

    summaries: int
    failures: int
    warned: int
    findings: tuple[str, ...]
    answers: Mapping[_Radiograph, int]

    @property
    def records(self) -> int:
        return self.summaries + self.failures

    @property
    def inputs(self) -> int:
        return len({name for name, _ in self.answers})


def survey(records: Iterable[Named]) -> Survey:
    """Count; what is kept grows by a few words a radiograph."""
    kinds: Counter[type[Record]] = Counter()
    findings: dict[str, None] = {}
    answers: Counter[_Radiograph] = Counter()
    warned = 0
    for name, record in records:
        kinds[type(record)] += 1
        answers[name, record.sha256] += 1
        if isinstance(record, Summary):
            warned += bool(record.warnings)
            findings.update(dict.fromkeys(finding.name for finding in record.findings))
    return Survey(kinds[Summary], kinds[Failure], warned, tuple(findings), answers)


def together(records: Iterable[Named], seen: Survey) -> Iterator[tuple[str, list[Record]]]:
    """The records by radiograph, each group as soon as its last record came; at most what `seen` counted.

    Only groups that are not complete yet are held: a run writes the answers about one radiograph close together.
    """
    waiting: dict[_Radiograph, list[Record]] = {}
    for name, record in islice(records, seen.records):
        radiograph = (name, record.sha256)
        group = waiting.setdefault(radiograph, [])
        group.append(record)
        if len(group) >= seen.answers.get(radiograph, 1):
            yield name, waiting.pop(radiograph)
    for (name, _), group in waiting.items():  # the journal was changed between the two looks
        yield name, group
