"""Many radiographs through one model at once: files → small batches of the encoder → lanes → records.

    reading processes ─▶ this thread: encoder ─▶ lanes, a thread and a sequence each ─▶ this thread: records

Files are read ahead of the encoder and studies are encoded ahead of the lanes, both within bounds, so that memory does
not grow with the number of files. A lane asks one radiograph's questions as `summarize` would. Knows no journal.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from xraygpt_lite.batch.inputs import Input
from xraygpt_lite.batch.workers import Decoded, Failed, Pool
from xraygpt_lite.chat import ChatSession, Study
from xraygpt_lite.closing import Closing
from xraygpt_lite.errors import XrayError
from xraygpt_lite.imaging.transform import normalize
from xraygpt_lite.model import XrayModel
from xraygpt_lite.prompt import Asked
from xraygpt_lite.values import Failure, Finding, GenerationOptions, Pixels, Record
from xraygpt_lite.vision import return_freed_memory

_LOOK_S = 0.02  # between two looks at what has been read, while answers are waited for
_PAUSE_S = 0.2
_TRIM_S = 10.0  # between two moments when freed memory goes back to the system: it would grow for hours
_EXTRA_LANES = 1  # beside the sequences: its next radiograph is ready when a sequence becomes free


@dataclass(frozen=True)
class Ask:
    """What is asked of every radiograph.

    Attributes
    ----------
    questions
        One record each; None is the bundle's default question, or the task's.
    task, box, variant, options
        As for `XrayModel.summarize`.
    findings
        Score every finding that the bundle lists, too.
    """

    questions: tuple[str | None, ...] = (None,)
    task: str | None = None
    box: tuple[float, float, float, float] | None = None
    variant: str | None = None
    options: GenerationOptions | None = None
    findings: bool = False


@dataclass(eq=False)
class Job:
    """One file and what is still to be asked of it.

    Attributes
    ----------
    file
        The journal's digest of it.
    records
        What came of it and was not taken yet.
    finished
        No more records come; set by a lane, at any moment.
    last
        It is yielded for the last time; set by the thread that yields it, so that nothing is counted twice.
    """

    input: Input
    asked: Sequence[Asked]
    file: str = ""
    records: deque[Record] = field(default_factory=deque)
    finished: bool = False
    last: bool = False


@dataclass(eq=False)
class _Work:
    """A job in a lane."""

    job: Job
    study: Study
    began: float = 0.0
    chat: ChatSession | None = None
    late: bool = False


class Pipeline(Closing):
    """Use `run` once, then close it; one thread at a time.

    Parameters
    ----------
    model
        Open, with as many sequences as radiographs are to be answered for at once.
    ask
        Checked before, by `XrayModel.check`.
    pool
        Processes that read files; closed with this.
    timeout
        Seconds that the answers about one radiograph may take; so many times as long as others are answered for beside
        it, because they share the machine.
    begin
        Called with a job and its content's sha256 before the encoder sees it; may take out of `Job.asked` what need not
        be asked.
    """

    def __init__(
        self,
        model: XrayModel,
        ask: Ask,
        pool: Pool,
        timeout: float,
        begin: Callable[[Job, str], object] = lambda _, __: None,
    ) -> None:
        self._model, self._ask, self._pool, self._begin = model, ask, pool, begin
        self._timeout = timeout * model.plan.sequences
        self._jobs: dict[int, Job] = {}  # by their input's identity: a file that has changed may come a second time
        self._read: deque[Decoded] = deque()
        self._studies: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Job | BaseException] = queue.SimpleQueue()
        self._working: set[_Work] = set()
        self._closed = False
        lanes = model.plan.sequences + _EXTRA_LANES
        self._lanes = [threading.Thread(target=self._lane, name="lane", daemon=True) for _ in range(lanes)]
        for lane in self._lanes:
            lane.start()

    @property
    def in_flight(self) -> int:
        """Jobs that were taken and have not come back."""
        return len(self._jobs)

    def run(self, jobs: Iterator[Job | None]) -> Iterator[Job | None]:
        """Yield a job whenever it has records, and once when it is finished; the caller takes the records out.

        Parameters
        ----------
        jobs
            Pulled only as far as needed; None: there is none at the moment.

        Returns
        -------
        iterator
            None about five times a second, so that the caller may do something else.

        Raises
        ------
        XrayError
            What concerns all: the model stopped working, or no process that reads can be started.
        """
        ahead = self._model.encoder_batch + len(self._lanes)
        source: Iterator[Job | None] | None = jobs
        looked = trimmed = time.monotonic()
        while True:
            while source is not None and self._pool.pending + len(self._read) < ahead:
                job = next(source, self)
                if job is self:
                    source = None
                elif not isinstance(job, Job):
                    break
                elif job.finished:
                    job.last = True
                    yield job
                else:
                    self._jobs[id(job.input)] = job
                    self._pool.submit(job.input)
            self._take()
            self._encode()
            # All that ended while the encoder was at work: one at a time they would pile up where it is the slower.
            for _ in range(self._ended.qsize() or 1):
                job = self._next_ended()
                if job is not None and id(job.input) in self._jobs:
                    if job.finished:
                        job.last = True
                        del self._jobs[id(job.input)]
                    yield job
                elif source is None and not self._jobs:
                    return
            if time.monotonic() - looked > _PAUSE_S:
                looked = time.monotonic()
                self._stop_late()
                if looked - trimmed > _TRIM_S:
                    trimmed = looked
                    return_freed_memory()
                yield None

    def close(self) -> None:
        """End at once: what is in work is dropped. The model is closed too, so that its answers end."""
        if self._closed:
            return
        self._closed = True
        self._pool.close()
        for _ in self._lanes:
            self._studies.put(None)
        self._model.close()
        for lane in self._lanes:
            lane.join()

    def _take(self) -> None:
        """Collect what was read; what could not be is finished."""
        while (result := self._pool.take(0)) is not None:
            if isinstance(result, Decoded):
                self._read.append(result)
            else:
                self._end(self._jobs[id(result.input)], self._failures(result))

    def _end(self, job: Job, records: Iterable[Record] = ()) -> None:
        job.records.extend(records)
        job.finished = True
        self._ended.put(job)

    def _encode(self) -> None:
        """Encode what lanes will want; where that is at the cost of the language model, all of it before it goes on."""
        if self._wanted():
            with self._model.encoder_first():
                while self._wanted():
                    self._encode_batch()
                    self._take()

    def _wanted(self) -> bool:
        """Whether a whole batch, or what there is before lanes run dry, is to be encoded."""
        waiting, most = self._studies.qsize(), self._model.encoder_batch
        if self._model.takes_turns:
            enough = waiting + len(self._working) > len(self._lanes)
        else:
            enough = waiting > len(self._lanes) or (len(self._read) < most and waiting > 1)
        return bool(self._read) and not enough

    def _encode_batch(self) -> None:
        batch = []
        for _ in range(min(self._model.encoder_batch, len(self._read))):
            one = self._read.popleft()
            job = self._jobs[id(one.input)]
            self._begin(job, one.radiograph.sha256)
            if job.asked:
                batch.append(one)
            else:
                self._end(job)
        if not batch:
            return
        try:
            self._encode_these(batch)
        except XrayError:
            if not self._model.usable:
                raise
            self._encode_each(batch)

    def _encode_each(self, batch: Sequence[Decoded]) -> None:
        """Of a batch that could not be encoded, fail what cannot be alone; raise where a blank image cannot either."""
        for one in batch:
            try:
                self._encode_these([one])
            except XrayError as why:
                self._encode_blank(one)
                failed = Failed(one.input, one.radiograph.sha256, "vision", type(why).__name__, str(why))
                self._end(self._jobs[id(one.input)], self._failures(failed))

    def _encode_blank(self, like: Decoded) -> None:
        pixels = Pixels(normalize([np.zeros_like(like.square)], self._model.bundle.manifest.image), (like.placement,))
        self._model.encode([replace(like.radiograph, source="blank")], pixels, [0.0])

    def _encode_these(self, batch: Sequence[Decoded]) -> None:
        squares = normalize([one.square for one in batch], self._model.bundle.manifest.image)
        pixels = Pixels(squares, tuple(one.placement for one in batch))
        radiographs = [one.radiograph for one in batch]
        studies = self._model.encode(radiographs, pixels, [one.seconds for one in batch])
        for one, study in zip(batch, studies, strict=True):
            self._studies.put(_Work(self._jobs[id(one.input)], study))

    def _next_ended(self) -> Job | None:
        """A job that has something new; waits a moment for one, less where something may be encoded meanwhile."""
        try:
            ended = self._ended.get(timeout=_LOOK_S)
        except queue.Empty:
            return None
        if isinstance(ended, BaseException):
            raise ended
        return ended

    def _stop_late(self) -> None:
        for work in tuple(self._working):
            if work.chat is not None and time.monotonic() - work.began > self._timeout:
                work.late = True
                work.chat.close()

    def _failures(self, failed: Failed) -> list[Record]:
        job = self._jobs[id(failed.input)]
        source = str(failed.input.path)
        return [
            Failure(source, failed.sha256, one.question, failed.stage, failed.error, failed.message)
            for one in job.asked
        ]

    # Run by the lanes.

    def _lane(self) -> None:
        while (work := self._studies.get()) is not None:
            self._working.add(work)
            try:
                self._answer(work)
                self._end(work.job)
            # Whatever it is, the caller must hear of it: it waits for this lane.
            except BaseException as error:
                self._ended.put(error)
            finally:
                self._working.discard(work)

    def _answer(self, work: _Work) -> None:
        job, ask = work.job, self._ask
        left = deque(job.asked)
        try:
            with self._model.converse(work.study, variant=ask.variant) as chat:
                work.began, work.chat = time.monotonic(), chat
                findings = chat.findings() if ask.findings else ()
                while left:
                    job.records.append(self._summary(chat, left[0], findings))
                    left.popleft()
                    if left:
                        self._ended.put(job)  # each record as it comes: an answer to many questions takes long
        except XrayError as error:
            if self._closed or not self._model.usable:
                raise
            stage, name, message = error.stage, type(error).__name__, str(error)
            if work.late:
                stage, name = "generate", "Timeout"
                message = f"the answer took longer than {self._timeout:g} s; ask for fewer tokens, or allow more time"
            radiograph = work.study.radiograph
            job.records.extend(
                Failure(str(job.input.path), radiograph.sha256, one.question, stage, name, message) for one in left
            )

    def _summary(self, chat: ChatSession, asked: Asked, findings: tuple[Finding, ...]) -> Record:
        chat.restart()
        summary = chat.ask(asked.question, self._ask.options, task=asked.task, box=asked.box)
        return replace(summary, findings=findings) if findings else summary
