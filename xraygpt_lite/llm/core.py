"""The engine thread: it alone touches the context, and decodes one row for every active sequence in each step.

What prompts have in common, the rows before the first image, is prefilled once: a sequence keeps it when it is given
back, and others copy it; later processes find it in a store. Prompts of one form are prefilled in common calls. Where
one answer is written alone, a call may also verify guesses at its next tokens.

Knows requests and native objects. Callers, slots and streams live in `scheduler`; they only submit and wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from ..errors import CancelledError, ClosedError, NativeError, UsageError, XrayError
from ..values import DevicePlan
from .beginnings import Beginnings
from .native import Batch, Context, Model
from .openings import Openings
from .requests import Cut, Generate, Request, Trace
from .search import Search
from .sequence import Held
from .speculation import Speculation

_GAP = 4  # sequences: about as many rows as cost what reading the weights once does


class Core:
    """Model, context and thread of one engine. Holds no reference to the `Engine` that callers see."""

    def __init__(
        self,
        gguf: Path,
        plan: DevicePlan,
        cores: AbstractContextManager[object],
        phrases: Sequence[str] | None,
        openings: Openings | None,
    ) -> None:
        self._cores = cores
        self.model = Model(gguf, plan.gpu_layers)
        self.cells = min(plan.context, self.model.trained_context)
        try:
            self.context = Context(self.model, plan, self.cells)
        except XrayError:
            self.model.close()
            raise
        self.lock = threading.Condition()
        self.closed = False
        self._batch = Batch(self.context.batch)
        self._free = list(range(plan.sequences))
        self.plan = plan
        self._holders: dict[int, int] = {}
        self._inbox: SimpleQueue[Request | Held | None] = SimpleQueue()
        self._active: list[Request] = []
        self._beginnings = Beginnings(self.context, openings)
        self._speculation = None
        if phrases is not None:
            self._speculation = Speculation(self.model.tokenize(each, leading_space=True).tolist() for each in phrases)
        self._broken: str | None = None
        self._thread = threading.Thread(target=self._run, name="xraygpt-lite-engine", daemon=True)
        self._thread.start()

    # Called from any thread.

    @property
    def usable(self) -> bool:
        """Whether requests are taken."""
        return self._broken is None and not self.closed

    @property
    def free(self) -> int:
        """Sequences that nobody holds at the moment."""
        return len(self._free)

    def take_sequence(self) -> Held:
        """Wait for a free sequence and take it."""
        me = threading.get_ident()
        with self.lock:
            while True:
                self._check_open()
                if self._free:
                    held = Held(self._free.pop(0))
                    self._holders[held.id] = me
                    return held
                owners = list(self._holders.values())
                if len(owners) == self.plan.sequences and all(owner == me for owner in owners):
                    raise UsageError(
                        f"all {self.plan.sequences} sequences of the model are held by this thread, which would wait "
                        "forever; close a chat first or load the model with more sequences"
                    )
                self.lock.wait()

    def release(self, held: Held, last: list[Request]) -> None:
        """Give a sequence back; also from a finalizer, so it takes no lock."""
        for request in last:
            request.cancelled = True
        self._holders.pop(held.id, None)
        held.closed = True
        self._inbox.put(held)

    def submit(self, request: Request) -> None:
        """Hand a request to the engine thread."""
        with self.lock:
            try:
                self._check_open()
            except XrayError as error:
                request.end(error)
                raise
            self._inbox.put(request)

    def wake(self) -> None:
        """Make the thread look at its requests again, for one was cancelled."""
        self._inbox.put(None)

    def stop(self) -> None:
        """End the thread and free everything; idempotent, and also run when the interpreter exits."""
        with self.lock:
            self.closed = True
            self.lock.notify_all()
        self._inbox.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _check_open(self) -> None:
        if self._broken is not None:
            raise NativeError(f"the language model stopped working ({self._broken}); load it again")
        if self.closed:
            raise ClosedError("the language model was closed; load it again")

    # Run by the engine thread only.

    def _run(self) -> None:
        try:
            while not self.closed:
                self._collect()
                ready = self._ready()
                others = len(ready) < len(self._active)
                if others:
                    for request in [request for request in self._active if request.cancelled]:
                        self._fail([request], CancelledError("the answer was cancelled"))
                    # A step costs nearly the same without those that are to be prefilled, so they come first, with all
                    # that arrive meanwhile. A long prompt, of whole batches, lets the others go on in between.
                    if 0 < self._prefill() < self.context.batch:
                        continue
                    ready = self._ready()
                self._step(ready)
                if others:
                    self._search()
        # Whatever it is, callers must hear of it: they wait on queues.
        except Exception as error:
            self._broken = str(error)
        finally:
            # Nobody is let in from here on, so what is in the inbox is all that there is.
            with self.lock:
                self._give_up()
                self.context.close()
                self.model.close()
                self.lock.notify_all()

    def _give_up(self) -> None:
        """End every request, without touching the cache."""
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, Request):
                self._active.append(item)
        for request in self._active:
            try:
                self._check_open()
            except XrayError as error:
                request.end(error)
        self._active.clear()

    def _collect(self) -> None:
        """Take what callers sent; wait for it where nothing is to be done."""
        block = not self._active
        while block or not self._inbox.empty():
            item, block = self._inbox.get(), False
            if isinstance(item, Request) and item.held.closed:  # asked while another thread gave the sequence back
                item.end(CancelledError("the slot was closed"))
            elif isinstance(item, Request):
                self._active.append(item)
            elif isinstance(item, Held):
                self._free_sequence(item)

    def _free_sequence(self, held: Held) -> None:
        self._fail([r for r in self._active if r.held is held], CancelledError("the slot was closed"))
        self._beginnings.rewind(held.id)
        with self.lock:
            self._free.append(held.id)
            # Neighbouring ids share a decode call's micro-batch: keep the used ones low.
            self._free.sort()
            self.lock.notify()

    def _prefill(self) -> int:
        """Decode the next chunk of the first request that has any left, and of those of the same form; return the rows.

        Rows of other requests in a call change no bit of a row where all have the same number of rows.
        """
        waiting = [r for r in self._active if r.chunks or isinstance(r, (Cut, Trace))]
        for request in waiting:
            if request.opening is not None and self._beginnings.share(request.held.id, request.opening):
                request.opening, request.held.rows = None, len(request.chunks.popleft().content)
        if not waiting:
            return 0
        if not waiting[0].chunks:
            self._advance(waiting[0], ())
            return 1
        together = self._alike(waiting)
        first = together[0].chunks[0]
        rows = len(first.content)
        for request in together:
            self._beginnings.overwrite(request.held.id, request.held.rows)
        starts = np.array([request.held.rows for request in together])
        self._batch.put(
            np.concatenate([request.chunks[0].content for request in together]),
            (starts[:, None] + np.arange(rows)).ravel(),
            np.repeat([request.held.id for request in together], rows),
            np.tile(np.arange(rows) >= rows - first.outputs, len(together)),
        )
        if self._decode(together):
            for number, request in enumerate(together):
                if request.opening is not None:
                    self._beginnings.keep(request.held.id, request.opening)
                    request.opening = None
                request.held.rows += rows
                request.chunks.popleft()
                self._advance(request, range((number + 1) * rows - first.outputs, (number + 1) * rows))
        return rows * len(together)

    def _alike(self, waiting: list[Request]) -> list[Request]:
        """The first request and those whose next chunk can be decoded with its, by rising sequence.

        Of several that begin with the same opening one goes ahead, and the others copy it.
        """
        first = waiting[0].chunks[0]
        room = self.context.batch // len(first.content)
        together: list[Request] = []
        openings = set[bytes | None]()
        for request in waiting:
            if not request.chunks or len(together) == room or request.opening in openings - {None}:
                continue
            chunk = request.chunks[0]
            if chunk.content.shape == first.content.shape and chunk.outputs == first.outputs:
                together.append(request)
                openings.add(request.opening)
        return sorted(together, key=lambda request: request.held.id)

    def _ready(self) -> list[Generate]:
        """Requests that generate and have nothing else to do first."""
        return [r for r in self._active if isinstance(r, Generate) and not r.chunks and not r.cancelled]

    def _step(self, ready: Sequence[Generate]) -> None:
        """Decode the next rows of all requests that generate, for as long as there is nothing else to do."""
        if len(ready) == 1:
            self._step_alone(ready[0])
            while self._active == ready and self._inbox.empty():
                self._step_alone(ready[0])
        elif ready:
            self._step_together(sorted(ready, key=lambda request: request.held.id))

    def _step_together(self, ready: Sequence[Generate]) -> None:
        """Decode a row of each request, by rising sequence, in one call; and so on until there is other work."""
        rows = [(r.held.id, r.ids[-1], r.held.rows, r.wants_logits) for r in ready]
        between = self._between([row[0] for row in rows])
        rows = sorted([*rows, *((sequence, 0, length, False) for sequence, length in between.items())])
        order, tokens, places, outputs = zip(*rows, strict=True)
        self._batch.put(np.array(tokens, np.int32), places, order, outputs)
        at = [(request, (order.index(request.held.id),)) for request in ready]
        lasting = len(ready) == len(self._active) and not between
        while True:
            decoded = self._decode(ready)
            for sequence, length in between.items():
                self.context.cut(sequence, length)
            if not decoded:
                return
            for request, row in at:
                request.held.rows += 1
                self._advance(request, row)
            # None has ended, and none is at its last row.
            lasting = lasting and len(self._active) == len(ready) and all([r.wants_logits for r in ready])
            if not lasting or not self._inbox.empty():
                return
            self._batch.follow([request.ids[-1] for request in ready])

    def _between(self, sequences: Sequence[int]) -> dict[int, int]:
        """Sequences in small gaps between rising others, and how many rows each holds.

        llama.cpp decodes those together that have no gap between them, and goes through all weights again behind one:
        a row more in the gap, which is cut off again, costs less.
        """
        found: dict[int, int] = {}
        if sequences[-1] - sequences[0] == len(sequences) - 1:
            return found
        for before, after in pairwise(sequences):
            rows = {sequence: self.context.length(sequence) for sequence in range(before + 1, after)}
            if len(rows) <= _GAP and all(length < self.cells for length in rows.values()):
                found |= rows
        return found

    def _step_alone(self, request: Generate) -> None:
        """Decode the next row of the only request that generates, and those of guesses at what follows it."""
        held, speculation = request.held, self._speculation
        if speculation is None or not request.guessable:
            self._batch.put_token(request.ids[-1], held.rows, held.id, request.wants_logits)
            if self._decode([request]):
                held.rows += 1
                self._advance(request, (0,))
            return
        began, before = time.perf_counter(), len(request.ids)
        guesses = speculation.guess(request.ids, min(request.guessable, self.context.batch - 1))
        rows = 1 + len(guesses)
        content = np.array([request.ids[-1], *guesses], np.int32)
        self._batch.put(content, held.rows + np.arange(rows), held.id, request.wants_logits)
        if self._decode([request]):
            held.rows += rows
            self._advance(request, range(rows), guesses)
            speculation.called(len(guesses), len(request.ids) - before - 1, time.perf_counter() - began)
            speculation.learn(request.ids, before)

    def _search(self) -> None:
        """Take one step of every beam search; each decodes in a context of its own."""
        for request in [r for r in self._active if isinstance(r, Search) and not r.chunks]:
            with self._cores:
                self._advance(request, ())

    def _decode(self, requests: Sequence[Request]) -> bool:
        try:
            with self._cores:
                self.context.decode(self._batch)
        except NativeError as error:
            for request in requests:
                self._beginnings.forget(request.held.id)
            self._fail(requests, error)
            return False
        return True

    def _advance(self, request: Request, rows: range | tuple[int, ...], guesses: Sequence[int] = ()) -> None:
        try:
            if guesses:
                assert isinstance(request, Generate)
                request.advance(self.context, rows, guesses)
            else:
                request.advance(self.context, rows)
        # The reader is the caller's code: whatever it raises is the caller's to hear and ends this request alone.
        except Exception as error:
            self._fail([request], error)
        if request.done.is_set() and request in self._active:
            self._active.remove(request)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """End requests and leave their sequences as they were before."""
        for request in requests:
            rows, tail = request.start
            if rows:
                self.context.cut(request.held.id, rows)
            else:
                self._beginnings.rewind(request.held.id)
            request.held.rows, request.held.tail = rows, tail
            self._active.remove(request)
            request.end(error)
