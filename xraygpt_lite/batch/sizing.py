"""How long the sequences of a batch must be, and how many are worth having here.

Knows the bundle's wording and its tokenizer, and what was measured on this machine before; opens no context of its own
but to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from xraygpt_lite import device, prompt
from xraygpt_lite.bundle import gguf_header
from xraygpt_lite.cache import Cache
from xraygpt_lite.llm import native, rates, selftest
from xraygpt_lite.llm.sequence import check_fit
from xraygpt_lite.processors import Others
from xraygpt_lite.values import Bundle, DevicePlan, Pixels
from xraygpt_lite.vision import Encoder

CANDIDATES = (1, 2, 4, 8, 16)
SMALL_CANDIDATES = (*CANDIDATES, 32)
"""Of a small model, where what is done once a step counts, and so many rows cost no more seconds to measure."""
_KIND = "rates"
_BOX = 48  # rows that a box's markup may take, at least
_CHOICE = 8  # rows of an answer that is scored


def rows(bundle: Bundle, asked: Sequence[prompt.Asked], variant: str | None, answer: int, *, findings: bool) -> int:
    """Rows of the longest first turn: prompt, image and an answer of so many tokens.

    Raises
    ------
    UsageError
        The bundle has no such wording.
    ContextError
        A question and its answer are longer than the model can take, whatever the image.
    """
    manifest = bundle.manifest
    _, wording = prompt.variant_of(manifest.prompt, variant)
    image = np.zeros((manifest.image_tokens, manifest.width), np.float32)
    model = native.Model(bundle.llm, vocabulary_only=True)
    try:
        texts = [(prompt.wording(manifest.prompt, one, ""), answer, _BOX if one.box else 0) for one in asked]
        texts += [(finding.question, _CHOICE, 0) for finding in manifest.prompt.findings if findings]
        longest = 0
        for text, answered, beside in texts:
            needed = sum(map(len, prompt.build(wording, text, image, model.tokenize)))
            check_fit(0, needed, answered, gguf_header.read(bundle.llm).context_length)
            longest = max(longest, needed + answered + beside)
        return longest
    finally:
        model.close()


def sequences(
    bundle: Bundle, plan: DevicePlan, wanted: int | None = None, doing: Callable[[str], object] = lambda _: None
) -> tuple[int, int, tuple[str, ...]]:
    """How many radiographs to answer for at once with this plan, with how many of its threads, and why.

    `wanted` is the number that was asked for. It is measured once for a bundle, build, CPU and number of threads, and
    remembered, but for what was measured while other programs had the processors; memory is looked at every time.
    `doing` is told when something has to be measured.
    """
    cache = Cache(device.cache_folder())
    key = f"{bundle.id} {native.build_id()} {selftest.cpu_id()} {plan.threads} {plan.step_threads} {plan.gpu_layers}"
    known = cache.get(_KIND, key)
    several = {plan.threads, plan.threads // 2} - {0} if plan.gpu_layers == 0 else {plan.threads}
    header = gguf_header.read(bundle.llm)
    tried = SMALL_CANDIDATES if header.token_bytes < device.STEP_BYTES else CANDIDATES
    try:
        seconds = {threads: dict(zip(tried, known[str(threads)], strict=True)) for threads in several}
        encoder = float(known["encoder"])
    except (TypeError, KeyError, ValueError):  # never measured, or by another version
        doing("measuring how many radiographs at once are fastest with this bundle on this machine")
        others = Others()
        seconds = {
            threads: rates.step_seconds(bundle.llm, replace(plan, threads=threads), tried) for threads in several
        }
        encoder = _encoder_seconds(bundle, plan)
        if others.in_the_way(plan.threads):
            doing("other programs were at work: what was measured may be wrong, and is measured again the next time")
        else:
            measured = {str(threads): list(each.values()) for threads, each in seconds.items()}
            cache.put(_KIND, key, {**measured, "encoder": encoder})
    size, room = header.cache_row * plan.context, device.free_memory() - bundle.llm.stat().st_size
    return device.parallel(seconds, encoder, size, room, wanted)


def _encoder_seconds(bundle: Bundle, plan: DevicePlan) -> float:
    """Seconds that one radiograph takes; the first, which takes longer, does not count."""
    side = bundle.manifest.image.size
    pixels = Pixels(np.zeros((1, 3, side, side), np.float32), ())
    encoder = Encoder(bundle, plan)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        encoder.encode(pixels)
        times.append(time.perf_counter() - began)
    encoder.close()
    return min(times[1:])
