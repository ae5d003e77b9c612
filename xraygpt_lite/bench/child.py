"""The measured process: a fresh Python that imports, loads, warms up, and answers again and again.

Then, its peak of memory noted, it measures what the machine could do (`ceilings`). It is a program of its own, so that
its times and memory are those of a run and of nothing else; so it imports what it measures only when that is timed.

Standard input has the request, one JSON object on a line, and stays open: where it ends, nobody waits for the answer
any more, and this process ends, too. Standard output gets objects, one a line: {"doing": what comes now}, and at last
{"samples": name → values, "facts": …} or {"error": class, "message": …}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xraygpt_lite.errors import UsageError, XrayError

if TYPE_CHECKING:
    from xraygpt_lite.bench.ceilings import Prompt
    from xraygpt_lite.llm.scheduler import Generation
    from xraygpt_lite.model import XrayModel
    from xraygpt_lite.values import GenerationOptions, Manifest, Summary

_clock = time.perf_counter
_BORN = _clock()


class Measurement:
    """One request measured; `samples` has every value of each figure, `facts` what is not repeated."""

    def __init__(self, request: dict[str, Any], doing: Callable[[str], object]) -> None:
        self._request, self._doing = request, doing
        self.samples: dict[str, list[float]] = defaultdict(list)
        self.facts: dict[str, Any] = {}
        self._prompts: list[Prompt] = []
        self._said: list[Generation] = []

    def run(self) -> None:
        """Measure. Raises as `load` and `summarize`, and UsageError where so many tokens never come."""
        request = self._request
        plain = not (request["speculation"] or request["prompt_cache"])
        began = _clock()
        self.samples["start"].append(_BORN - request["began"])  # one clock for all processes
        _import(request["dicom"])
        self.samples["import"].append(_clock() - began)
        began = _clock()
        with self._load(request["speculation"], request["prompt_cache"]) as model:
            self.samples["load"].append(_clock() - began)
            if request["only_start"]:
                return
            self._repeat(model)
            if plain:
                self._compare(model)
        if not plain:
            with self._load(False, False) as model:
                self._compare(model)

    def _load(self, speculation: bool, prompt_cache: bool) -> XrayModel:
        from xraygpt_lite import model as models

        names = ("bundle", "device", "threads")
        given = {name: self._request[name] for name in names}
        return models.load(**given, context=self._rows_needed, speculation=speculation, prompt_cache=prompt_cache)

    def _rows_needed(self, manifest: Manifest) -> int:
        """The context that `summarize` takes for a first question."""
        from xraygpt_lite import prompt
        from xraygpt_lite.options import resolve

        _, variant = prompt.variant_of(manifest.prompt, None)
        longest = resolve(_options(self._request["tokens"]), manifest).max_tokens
        return prompt.most_rows(manifest, variant, manifest.prompt.default_question, longest)

    def _repeat(self, model: XrayModel) -> None:
        """Warm up; time one image after another, again and again, each as the first of a process."""
        from xraygpt_lite.llm import rates
        from xraygpt_lite.processors import Others

        self._others = Others()
        images, tokens = self._request["images"], self._request["tokens"]
        forget, options = rates.forgetting(model._engine), _options(tokens)
        self._doing("warming up")
        lengths: list[int] = []
        for image in images:
            lengths.append(self._answer(model, image, options, {}).answer_tokens)
            self.facts.setdefault("first_answer_s", _clock() - self._request["began"])
        if tokens and min(lengths) < tokens:
            # Not from the beginning: barring what ends an answer takes time at every token, and excludes guesses.
            options = replace(options, min_tokens=tokens)
            lengths = [self._answer(model, image, options, {}).answer_tokens for image in images]
        _check_lengths(lengths, tokens)
        for number in range(self._request["repeats"]):
            self._doing(f"answering, {number + 1} of {self._request['repeats']}")
            for image in images:
                forget()
                self._answer(model, image, options, self.samples)
        self.facts |= {"answer_tokens": lengths, "peak_rss_mb": peak_bytes() / 1e6, **_about(model)}
        self._split_vision(model)
        from xraygpt_lite.bench import ceilings

        for image in images:
            self._prompts.append(ceilings.Prompt.of(model, image, options))
            forget()
            self._said.append(self._prompts[-1].answer(model._engine))
            if not options.min_tokens:
                self.samples["tokens_per_call"].append(ceilings.rows(self._said[-1]) / self._said[-1].calls)

    @staticmethod
    def _answer(model: XrayModel, image: str, options: GenerationOptions, samples: dict[str, list[float]]) -> Summary:
        """What `summarize` does, in the two steps that it consists of."""
        began = _clock()
        study = model.study(image)
        seen = _clock()
        with model.converse(study) as chat:
            summary = chat.ask(None, options)
        ended = _clock()
        took = summary.timings
        stages = {
            "read": took.read,
            "preprocess": seen - began - took.read - took.vision,
            "vision": took.vision,
            "prefill": took.prefill,
            "decode": took.generate,
            "rest": ended - seen - took.prefill - took.generate,
            "first_token_s": ended - began - took.generate,
            "total_s": ended - began,
            # The first token comes of the prompt; one that stops the answer is never decoded.
            "tokens_per_s": (summary.answer_tokens - (summary.finish == "stop")) / took.generate,
        }
        for name, value in stages.items():
            samples.setdefault(name, []).append(value)
        return summary

    def _split_vision(self, model: XrayModel) -> None:
        """Run the projector alone: the encoder took the rest of what both took."""
        from xraygpt_lite import vision
        from xraygpt_lite.imaging.read import read
        from xraygpt_lite.imaging.transform import transform

        pixels = transform([read(self._request["images"][0])], model.bundle.manifest.image)
        features = model._encoder.features(pixels)
        projector = vision.open_graph(model.bundle.projector, model.plan)
        both = self.samples.pop("vision")
        for number in range(len(both) + 1):
            began = _clock()
            projector.run(["embeddings"], {"features": features})
            if number:  # the first warms up
                self.samples["project"].append(_clock() - began)
        alone = sorted(self.samples["project"])[len(both) // 2]
        self.samples["encode"] = [seconds - alone for seconds in both]

    def _compare(self, model: XrayModel) -> None:
        from xraygpt_lite.bench import ceilings, machine

        repeats = self._request["repeats"]
        self.facts |= ceilings.compare(model, self._prompts, self._said, repeats, self.samples, self._doing)
        self.facts |= {"others_share": self._others.share, "machine": machine.facts()}


def peak_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The largest resident set of this process so far; unlike the system's usage record, not that of its parent."""
    lines = status.read_text("ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _import(dicom: bool) -> None:
    """All that a run imports, the native libraries included."""
    from xraygpt_lite import model, vision
    from xraygpt_lite.llm import native

    del model
    vision.available_providers()
    native.supports_gpu()
    if dicom:
        from xraygpt_lite.imaging import dicom as reader

        del reader


def _options(tokens: int | None) -> GenerationOptions:
    """Greedy, of at most so many tokens; None: as the bundle ends an answer."""
    from xraygpt_lite.values import GenerationOptions

    least = None if tokens is None else 0
    return GenerationOptions(temperature=0.0, beams=1, repeat_penalty=1.0, max_tokens=tokens, min_tokens=least)


def _check_lengths(lengths: list[int], tokens: int | None) -> None:
    if min(lengths) < 2:
        raise UsageError("an answer of one token is too short to be measured; ask for more with --tokens")
    if tokens and min(lengths) < tokens:
        raise UsageError(
            f"a stop string ends an answer after {min(lengths)} tokens, and {tokens} were asked for; "
            f"give --tokens {min(lengths)} or fewer, or leave it out"
        )


def _about(model: XrayModel) -> dict[str, Any]:
    from xraygpt_lite.bundle import gguf_header

    manifest, header = model.bundle.manifest, gguf_header.read(model.bundle.llm)
    return {
        "bundle": manifest.name,
        "bundle_id": model.bundle.id,
        "weight_types": dict(manifest.weight_types),
        "device": model.plan.device,
        "threads": model.plan.threads,
        "providers": list(model.providers),
        "reasons": list(model.plan.reasons),
        "token_mb": header.token_bytes / 1e6,
        "files_mb": sum(entry.size for entry in manifest.files) / 1e6,
        "kv_cache_mb": header.cache_row * model._engine.context / 1e6,
    }


def _end_with_the_caller() -> None:
    """It is gone when it cannot write any more. Past the buffered reader, whose lock Python wants when it ends."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Answer the request on standard input; the exit status is 0 wherever an answer was given."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_caller, daemon=True).start()

    def put(answer: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    measurement = Measurement(request, lambda text: put({"doing": text}))
    try:
        measurement.run()
    except XrayError as error:
        put({"error": type(error).__name__, "message": str(error)})
    except MemoryError:
        put({"error": "MemoryError", "message": ""})
    except KeyboardInterrupt:
        return 130
    else:
        put({"samples": measurement.samples, "facts": measurement.facts})
    return 0


if __name__ == "__main__":
    sys.exit(main())
