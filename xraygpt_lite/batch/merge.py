"""Finished journals joined into one: those of an array job's shards, or any of the same bundle and options.

Reads every journal twice as a stream; in memory are digests of keys only. Knows no run and no input.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xraygpt_lite.batch import durable
from xraygpt_lite.batch.keys import Keys, read_salt, write_salt
from xraygpt_lite.batch.lines import Entry, Header, differences, entries, read
from xraygpt_lite.errors import UsageError, XrayError
from xraygpt_lite.values import Summary

_Part = tuple[int, int] | int
_LISTED = 20  # missing shards in one sentence


@dataclass(frozen=True)
class Merged:
    """What a merge wrote.

    Attributes
    ----------
    records, failures
        In the output; failures are records.
    gaps
        Sentences about what is missing: shards, and records of journals that were not finished.
    overlaps
        Records that were left out because another one has the same key.
    """

    records: int
    failures: int
    gaps: tuple[str, ...]
    overlaps: int


@dataclass(frozen=True)
class _Source:
    """A journal; `part` is its shard, or for one of all inputs its place in the list."""

    path: Path
    header: Header
    part: _Part


def merge(paths: Sequence[Path], output: Path) -> Merged:
    """Write the records of several journals to a new one, in the order given.

    Of two records with one key a `Summary` is kept rather than a `Failure`, else the first. The output's header is the
    first one's, of no shard, with the sum of all inputs (each shard counted once).

    Parameters
    ----------
    output
        Whole or absent; with the salt beside it where names are kept out and the salt lies beside one of `paths`.

    Raises
    ------
    UsageError
        There is such an output, a journal is named twice, or two do not belong together; each difference is named.
    XrayError
        As in `journal.read`, or the output cannot be written.
    """
    _check_names(paths)
    target = output.parent.resolve() / output.name
    with durable.locked(target, str(output)):
        if os.path.lexists(target):
            raise UsageError(f"{output} exists; choose another output, or remove it first")
        sources = [_source(number, path) for number, path in enumerate(paths)]
        _check_together(sources)
        keys: dict[bytes, _Part] = {}
        answered: set[bytes] = set()
        held: Counter[_Part] = Counter()
        total = 0
        # Journals of one shard follow each other here, so that a record that two of them hold counts once for it.
        for source in sorted(sources, key=lambda source: str(source.part)):
            for entry, _ in entries(source.path, str(source.path)):
                key = _key(entry)
                held[source.part] += keys.get(key) != source.part
                keys[key] = source.part
                if isinstance(entry.record, Summary):
                    answered.add(key)
                total += 1
        records, failures = len(keys), len(keys.keys() - answered)
        header = replace(sources[0].header, shard=None, inputs=_inputs(sources))
        _copy_salt(paths, header, target, output)
        with durable.in_words(f"{output} cannot be written"):
            durable.replace(target, _lines(header, paths, keys, answered))
    return Merged(records, failures, tuple(_gaps(sources, held)), total - records)


def _source(number: int, path: Path) -> _Source:
    header, _ = read(path)
    return _Source(path, header, header.shard or number)


def _lines(header: Header, paths: Sequence[Path], keys: dict[bytes, _Part], answered: set[bytes]) -> Iterator[bytes]:
    """The merged journal; `keys` is used up."""
    yield header.line()
    for path in paths:
        for entry, raw in entries(path, str(path)):
            key = _key(entry)
            if key in keys and (isinstance(entry.record, Summary) or key not in answered):
                del keys[key]
                yield raw  # as it stands: a later version may have added fields
    if keys:
        raise XrayError("a journal was begun anew while it was merged; wait until no run writes them, and merge again")


def _key(entry: Entry) -> bytes:
    return bytes.fromhex(entry.key)[:16]


def _inputs(sources: Sequence[_Source]) -> int | None:
    """Inputs of all; None if one run did not know how many it would have."""
    counts: dict[_Part, int] = {}
    for source in sources:
        if source.header.inputs is None:
            return None
        counts[source.part] = max(source.header.inputs, counts.get(source.part, 0))
    return sum(counts.values())


def _gaps(sources: Sequence[_Source], held: Counter[_Part]) -> Iterator[str]:
    shards = {source.header.shard for source in sources if source.header.shard}
    whole = [source.path for source in sources if not source.header.shard]
    if shards:
        (count,) = {count for _, count in shards}
        missing = [str(number) for number in range(1, count + 1) if (number, count) not in shards]
        if missing and whole:
            yield f"{whole[0]} is no shard: which of the {count} shards it holds cannot be told"
        elif missing:
            more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            yield f"of {count} shards these are missing: {', '.join(missing[:_LISTED])}{more}"
    questions = sources[0].header.options.get("questions")
    each = len(questions) if isinstance(questions, list) and questions else 1
    for part in dict.fromkeys(source.part for source in sources):
        own = [source for source in sources if source.part == part]
        expected = each * max(source.header.inputs or 0 for source in own)
        if held[part] < expected:
            names = " and ".join(str(source.path) for source in own)
            yield f"{names}: {held[part]} of {expected} records; run its command again to finish it"


def _check_names(paths: Sequence[Path]) -> None:
    if not paths:
        raise UsageError("no journal was given; name those to merge")
    names = Counter(os.path.realpath(path) for path in paths)
    for path in paths:
        if names[os.path.realpath(path)] > 1:
            raise UsageError(f"{path} is named twice; name each journal once")


def _check_together(sources: Sequence[_Source]) -> None:
    first = sources[0]
    sharded = first
    for source in sources:
        found = differences(first.header, source.header, shards=False)
        advice = ""
        if first.header.salt != source.header.salt:
            found.append(("salt", str(first.header.salt), str(source.header.salt)))
            advice = "; where names are kept out, shards need one salt: copy it beside each output before they start"
        if found:
            listed = "; ".join(f"{name} is {one} and {other}" for name, one, other in found)
            raise UsageError(f"{first.path} and {source.path} do not belong together: {listed}{advice}")
        sharded = sharded if sharded.header.shard else source
        one, two = sharded.header.shard, source.header.shard
        if one and two and one[1] != two[1]:
            raise UsageError(
                f"{sharded.path} and {source.path} do not belong together: they are shards of {one[1]} and of {two[1]}"
            )


def _copy_salt(paths: Sequence[Path], header: Header, target: Path, output: Path) -> None:
    """Put the salt beside the output, if one of the journals still has it: a run may then go on with the output."""
    if header.salt is None:
        return
    with durable.in_words(f"{output}.salt cannot be written"):
        if (there := read_salt(target)) is not None:
            if Keys(there).fingerprint == header.salt:
                return
            raise UsageError(f"{output}.salt is of another journal; choose another output, or remove it first")
        for path in paths:
            salt = read_salt(Path(os.path.realpath(path)))
            if salt is not None and Keys(salt).fingerprint == header.salt:
                write_salt(target, salt)
                return
