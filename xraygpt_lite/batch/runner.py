"""A run over many radiographs: what is done already is skipped, the rest goes through the pipeline into the journal.

    with Run(find([folder]), Ask(), output=Path("out.jsonl")) as run:
        for record in run: ...

Knows inputs, journal and pipeline; no format and no terminal.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from xraygpt_lite import __version__, scoring
from xraygpt_lite import device as devices
from xraygpt_lite import model as models
from xraygpt_lite.batch import sizing
from xraygpt_lite.batch.inputs import Input, find
from xraygpt_lite.batch.journal import Entry, Header, Journal, Keys
from xraygpt_lite.batch.pipeline import Ask, Job, Pipeline
from xraygpt_lite.batch.workers import Pool, worker_count
from xraygpt_lite.closing import Closing
from xraygpt_lite.errors import XrayError
from xraygpt_lite.options import resolve
from xraygpt_lite.prompt import Asked, ask, variant_of
from xraygpt_lite.values import Failure, GenerationOptions, Manifest, Record, Sampling, Summary

FILE_TIMEOUT = 300.0
"""Seconds that reading a file, and then answering about it, may take."""
_FATAL_CRASHES = 2


class Run(Closing):
    """Records of every input that has none yet; iterate it once.

    Parameters
    ----------
    inputs
        With names of their own. A None among them says that none is there at the moment.
    ask
        What is asked of each; None asks the bundle's default question.
    output
        The journal; None keeps none, and knows of no earlier run.
    count, shard
        For the journal's header: how many inputs there are, and the part of all inputs that they are.
    bundle, device, threads
        As for `load`.
    parallel
        Radiographs that are answered for at once; None chooses by what was measured here.
    identifiers
        False keeps paths, UIDs and hashes of files out of the records.
    restart, retry_failed
        As for `Journal`.
    file_timeout
        Seconds that one file may take to be read, and then to be answered for: so many times as long as others are
        answered for beside it.
    max_failures
        So many inputs that fail in this run end it.
    stop
        Once it is set, iterating raises KeyboardInterrupt, at a moment when nothing native is at work in this thread:
        raised by a signal handler it may be lost there.
    doing
        Told in words what takes time before the first record.

    Attributes
    ----------
    model
        What answers; its `plan` says where it runs.
    because
        Why so many radiographs are answered for at once, with so many threads.
    done, failed, skipped
        Inputs so far: answered for, with a failure, and those whose records were there.
    journal
        With what stands in it, of all runs; None without an output.

    Raises
    ------
    UsageError
        What is asked makes no sense for this bundle, or the output is of other options.
    XrayError
        As `load` and `Journal`.
    """

    def __init__(
        self,
        inputs: Iterable[Input | None],
        ask: Ask | None = None,
        *,
        output: Path | None = None,
        count: int | None = None,
        shard: tuple[int, int] | None = None,
        bundle: str | os.PathLike[str] | None = None,
        device: str = "auto",
        threads: int | None = None,
        parallel: int | None = None,
        identifiers: bool = True,
        restart: bool = False,
        retry_failed: bool = False,
        file_timeout: float = FILE_TIMEOUT,
        max_failures: int | None = None,
        stop: threading.Event | None = None,
        doing: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._inputs, self._max_failures = inputs, max_failures
        self.done = self.failed = self.skipped = 0
        self._failing: set[int] = set()
        self._stop = stop
        found = models.checked(bundle)
        manifest = found.manifest
        ask = ask or Ask()
        self._identifiers = identifiers
        self._asked, sampling = _check(ask, manifest)
        # What cannot be answered, or where, is told before an output is touched.
        rows = sizing.rows(found, self._asked, ask.variant, sampling.max_tokens, findings=ask.findings)
        plan = partial(models.plan, found, device=device, threads=threads, context=models.fitting(found, rows))
        shared = plan()
        with contextlib.ExitStack() as stack:
            self.journal: Journal | None = None
            if output is not None:
                options = {
                    "questions": [one.question for one in self._asked],
                    "task": ask.task,
                    "box": None if ask.box is None else list(ask.box),
                    "variant": variant_of(manifest.prompt, ask.variant)[0],
                    "sampling": asdict(sampling),
                    "findings": ask.findings,
                    "identifiers": identifiers,
                }
                header = Header(found.id, manifest.name, options, count, shard, manifest.disclaimer, __version__)
                journal = Journal(output, header, restart=restart, retry_failed=retry_failed)
                self.journal = stack.enter_context(journal)
            self._keys = self.journal.keys if self.journal else Keys(None)
            many, llm_threads, because = sizing.sequences(found, shared, parallel, doing)
            # Not before that: what its processes need for their start would be taken for other programs' work.
            pool = stack.enter_context(Pool(manifest.image, worker_count(devices.cores()), file_timeout))
            if count is not None and count < many:
                many, because = max(1, count), (*because, f"{max(1, count)} sequences: no more inputs than that")
            split = llm_threads if llm_threads < shared.threads else None
            chosen = plan(sequences=many, llm_threads=split, because=because)
            self.because = tuple(reason for reason in chosen.reasons if reason not in shared.reasons)
            self.model = stack.enter_context(models.XrayModel(found, chosen, prompt_cache=True))
            self._pipeline = stack.enter_context(Pipeline(self.model, ask, pool, file_timeout, self._begin))
            self._records = self._run()
            self._stack = stack.pop_all()

    def __iter__(self) -> Iterator[Record]:
        """Records as they come, each in the journal already or in it within a second. There is one such iterator."""
        return self._records

    def _run(self) -> Iterator[Record]:
        for job in self._pipeline.run(self._jobs()):
            if job is not None:
                yield from self._take(job)
                self._check_failures()
            if self._stop is not None and self._stop.is_set():
                raise KeyboardInterrupt
            if self.journal and self.journal.due:
                self.journal.flush()
        if self.journal:
            self.journal.flush()

    def close(self) -> None:
        """End at once: what is in work is dropped, what is finished is on the disk. Safe to call twice."""
        self._stack.close()

    def _jobs(self) -> Iterator[Job | None]:
        """What is left to do. What was in flight when an earlier run crashed comes last, or in a pause, and alone."""
        alone: list[Job] = []
        for given in self._inputs:
            job = None if given is None else self._job(given)
            if job is None:
                yield (suspect := self._next_alone(alone))
                while suspect and self._pipeline.in_flight:
                    yield None
            elif not job.asked:
                self.skipped += 1
                if self.journal and self._crashes(job):
                    self.journal.end(job.file)  # its records were written before the crash
            elif not self._crashes(job):
                yield job
            elif self._crashes(job) < _FATAL_CRASHES:
                alone.append(job)
            else:
                job.records.extend(_crashed(job.input, one.question) for one in job.asked)
                job.finished = True
                yield job
        while alone:
            yield self._next_alone(alone)

    def _next_alone(self, alone: list[Job]) -> Job | None:
        return alone.pop(0) if alone and not self._pipeline.in_flight else None

    def _job(self, given: Input) -> Job:
        """A file with the questions that no record answers; a file that has changed since is another one."""
        try:
            status = given.path.stat()
        except (OSError, ValueError):  # ValueError: a NUL in the path; reading it says so
            status = None
        file = self._keys.file(given.name, status)
        return Job(
            given, [one for one in self._asked if not (self.journal and self.journal.done(file, one.question))], file
        )

    def _crashes(self, job: Job) -> int:
        return self.journal.suspects.get(job.file, 0) if self.journal else 0

    def _begin(self, job: Job, sha256: str) -> None:
        """Leave out what was answered for the same content, copied or touched since; note the rest as in flight."""
        if not self.journal:
            return
        name, journal = job.input.name, self.journal
        job.asked = [one for one in job.asked if not journal.has(self._keys.key(name, sha256, one.question))]
        if job.asked:
            journal.begin(job.file)
        else:
            self.skipped += 1

    def _take(self, job: Job) -> Iterator[Record]:
        """A job's new records, in the journal; what is counted is counted before it is shown."""
        fresh = []
        while job.records:
            record = job.records.popleft()
            key = self._keys.key(job.input.name, record.sha256, record.question)
            shown = record if self._identifiers else self._hidden(record, job.input)
            if self.journal and not self.journal.has(key):  # one that could not be read again is known by no content
                self.journal.append(Entry(self._keys.label(job.input.name), key, job.file, shown))
            fresh.append(shown)
            if isinstance(record, Failure):
                self._failing.add(id(job))
        if job.last:
            self._count(job)
        yield from fresh

    def _count(self, job: Job) -> None:
        if id(job) in self._failing:
            self._failing.remove(id(job))
            self.failed += 1
        elif job.asked:
            self.done += 1
        if self.journal:
            if self._crashes(job):
                self.journal.flush()  # first, or another crash forgets both the failure and the count
            self.journal.end(job.file)

    def _hidden(self, record: Record, given: Input) -> Record:
        """The record without what tells the file: path, UID and hash."""
        label = self._keys.label(given.name)
        sha256 = record.sha256 and self._keys.key(given.name, record.sha256, "")
        if isinstance(record, Summary):
            return replace(record, source=label, sha256=sha256 or "", sop_instance_uid=None)
        message, path = record.message, str(given.path)
        if message.startswith(path):  # and nowhere else: a name may be a word
            message = label + message[len(path) :]
        return replace(record, source=label, sha256=sha256, message=message)

    def _check_failures(self) -> None:
        if self._max_failures is not None and self.failed >= self._max_failures:
            raise XrayError(
                f"{self.failed} inputs failed, as many as were allowed; see what they have in common, then run the "
                "same command again"
            )


def run(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    questions: Sequence[str] = (),
    task: str | None = None,
    box: tuple[float, float, float, float] | None = None,
    variant: str | None = None,
    options: GenerationOptions | None = None,
    findings: bool = False,
    output: str | os.PathLike[str] | None = None,
    shard: tuple[int, int] | None = None,
    **more: Any,
) -> Iterator[Record]:
    """Answer for many radiographs, several at once; yield a `Summary` or a `Failure` each as they come.

    Parameters
    ----------
    inputs
        Files, folders, patterns and lists, as `inputs.find` takes them.
    questions
        One record each; none asks the bundle's default question.
    task, box, variant, options
        As for `XrayModel.summarize`.
    findings
        Score the bundle's findings, too.
    output
        A journal: what is in it already is not done again, and not yielded.
    shard
        (3, 16): the third of sixteen parts of the inputs.
    more
        What `Run` takes: bundle, device, threads, parallel, restart, …

    Raises
    ------
    XrayError
        Before the first record: inputs, bundle, options or output cannot be used. Later: the disk is full, or the model
        stopped working.
    """
    arguments = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    found = find(arguments, shard=shard)
    ask = Ask(tuple(questions) or (None,), task, box, variant, options, findings)
    journal = None if output is None else Path(output)
    with Run(drained(found), ask, output=journal, count=len(found), shard=shard, **more) as records:
        yield from records


def drained(found: list[Input]) -> Generator[Input]:
    """What is found, each given away: the list shrinks while the journal's memory of what is done grows."""
    found.reverse()
    while found:
        yield found.pop()


def _check(given: Ask, manifest: Manifest) -> tuple[list[Asked], Sampling]:
    """What will be asked, and how; raises the UsageError that every radiograph would raise."""
    variant_of(manifest.prompt, given.variant)
    if given.findings:
        scoring.listed(manifest)
    asked = [ask(manifest.prompt, question, given.task, given.box) for question in given.questions]
    return list(dict.fromkeys(asked)), resolve(given.options, manifest)


def _crashed(given: Input, question: str) -> Failure:
    return Failure(
        str(given.path), None, question, "generate", "Crashed",
        f"the program ended {_FATAL_CRASHES} times while it was at work on this file, so it is skipped; try it alone "
        "with `xraygpt-lite summarize`, or again with --retry-failed",
    )  # fmt: skip
