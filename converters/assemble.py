"""The way from published files to a bundle: load, export, make smaller, compare, record the self-test, put into place.

Everything is made step by step in a folder beside the target (`staging`) and renamed at the end, so the target is a
whole bundle or untouched. Knows the order of the steps and the manifest; what differs between families lies in
`families` and in `models/<family>/template.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

from xraygpt_lite import __version__, compare, verify
from xraygpt_lite.bundle import manifest, store, typed_json
from xraygpt_lite.cache import Cache
from xraygpt_lite.converters import language, onnx, precision, weights
from xraygpt_lite.converters.families import Parts, loader
from xraygpt_lite.converters.language import LanguageModel
from xraygpt_lite.converters.progress import QUIET, Progress
from xraygpt_lite.converters.staging import Staging
from xraygpt_lite.errors import BundleError, ConversionError, UsageError
from xraygpt_lite.model import open_bundle
from xraygpt_lite.values import Bundle, FileEntry, Manifest, SelfTest, SourceFile

_NO_SELF_TEST = SelfTest(0, (), (), 0.0, "", (), (), 0.0)


@dataclass(frozen=True)
class Request:
    """What is converted into what.

    Attributes
    ----------
    family
        A key of `families.FAMILIES`.
    inputs
        Role → path: "vision", "checkpoint", "qformer" for the families that have one, and "llm" or "llm-base" and
        "llm-delta", with "tokenizer" where their folders lack one.
    output
        The bundle's folder, which does not exist yet.
    quant
        Weight type of the language model, one of `weights.QUANTS`: "auto" is `device.best_weights` from a billion
        weights on and q8_0 below. None keeps a GGUF as it is, and is "auto" for a folder.
    vision_type
        Weight type of the encoder, one of `precision.VISION_TYPES`.
    settings
        What the family takes with `--set`.
    name
        The bundle's name; None is the family's.
    force
        Replace a bundle that is there, and write one whose encoder agrees too little with float32.
    check_images
        Folder of radiographs that precisions are compared on; None: the installed examples.
    """

    family: str
    inputs: Mapping[str, Path]
    output: Path
    quant: str | None = None
    vision_type: str = "f32"
    settings: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    force: bool = False
    check_images: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """The finished bundle, the entries of the source files that nothing used, and what else is to be known of them."""

    bundle: Bundle
    ignored: tuple[str, ...]
    notes: tuple[str, ...]


def convert(request: Request, progress: Progress = QUIET) -> Outcome:
    """Make a bundle.

    A step that an earlier, interrupted call with the same request has finished is not done again.

    Raises
    ------
    ConversionError
        A file does not fit, the graphs differ from torch or, made smaller, too much from float32, or the folder cannot
        be written; the target is untouched.
    KeyboardInterrupt
        As it came; where finished steps are kept, it says so.
    UsageError
        A setting, weight type or name that cannot be meant.
    """
    _check_request(request)
    progress.step("reading names and shapes")
    radiographs = compare.check_images(request.check_images)
    llm = language.read(request.inputs)
    parts = loader(request.family)(request.inputs, llm.width, request.settings)
    if parts.lora is not None:
        llm.merge(parts.lora)
    draft = _draft(request, parts, llm)
    files = [*((role, path) for role, source in parts.sources.items() for path in source.files), *llm.files]
    room = weights.room(parts, llm, draft)
    with Staging(request.output, _identity(request, draft, files)) as staging:
        weights.check_space(request.output, sum(room) - staging.written())
        steps = _Steps(staging, progress)
        steps.writing("exporting vision and projector to ONNX", "graphs", room.graphs)
        figures = staging.step("graphs", ["reference/*.onnx*"], lambda: _export(parts, draft, staging.reference))
        parts = parts.unloaded()  # up to 4 GB, which the graphs now hold
        steps.writing(f"writing the encoder as {draft.weight_types['vision']}", "encoder", room.encoder)
        staging.step("encoder", ["bundle/*.onnx*"], lambda: weights.write_vision(draft, staging))
        steps.writing(f"writing the language model as {draft.weight_types['llm']}", "language model", room.llm)
        weights.write_llm(llm, draft, staging)
        steps.begin("comparing with what was not made smaller", "comparison")
        figures |= staging.step("comparison", [], lambda: weights.measure(draft, llm, staging, radiographs, progress))
        if "cosine_mean" in figures and not set(weights.ANSWERS) <= set(figures):
            progress.step("comparing no answers: the language model as stored is too large for this machine's memory")
        draft = replace(draft, agreement=figures, warnings=_shortfall(request, figures, staging))
        progress.step("recording the self-test")
        draft = replace(draft, self_test=_self_test(Bundle(staging.bundle, draft, "")))
        progress.step("hashing")
        finished = _hashed(draft, staging.bundle, files, progress)
        (staging.bundle / manifest.FILE_NAME).write_bytes(manifest.dump(finished))
        progress.step("checking the finished bundle")
        checked = store.load(staging.bundle, Cache(None))
        staging.finish()
    bundle = Bundle(request.output, checked.manifest, checked.id)
    return Outcome(bundle, (*parts.ignored, *llm.ignored), (*parts.notes, *llm.notes))


class _Steps:
    """Tells of steps that the folder may hold already, and of the bytes that they write."""

    def __init__(self, staging: Staging, progress: Progress) -> None:
        self._staging, self._progress = staging, progress
        self._whole = 0

    def begin(self, text: str, name: str) -> None:
        """A step, which the staging folder knows by `name`."""
        self._progress.step(text, kept=name in self._staging.finished)

    def writing(self, text: str, name: str, expected: int) -> None:
        """The same, of one that writes about so many bytes, a part of which an interrupted run may have written."""
        self.begin(text, name)
        self._whole += expected
        before = self._staging.written()
        self._progress.counting(lambda: self._staging.written() - before, self._whole - before, "bytes")


class _Hashes:
    """SHA-256 of files. `done` bytes were read so far."""

    def __init__(self) -> None:
        self.done = 0

    def of(self, path: Path) -> str:
        """Hexadecimal."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                self.done += len(chunk)
        return digest.hexdigest()


def template(family: str) -> dict[str, Any]:
    """A family's part of the manifest: name, licence, use, image and prompt specs, options."""
    path = resources.files("xraygpt_lite.models") / family / "template.json"
    try:
        return cast("dict[str, Any]", typed_json.decode(path.read_bytes(), f"models/{family}/template.json"))
    except OSError as error:
        raise ConversionError(
            f"models/{family}/template.json is missing from this installation; reinstall it"
        ) from error


def _check_request(request: Request) -> None:
    for option, value, known in (("--quant", request.quant or weights.AUTO, weights.QUANTS),
                                 ("--vision-type", request.vision_type, precision.VISION_TYPES)):  # fmt: skip
        if value not in known:
            raise UsageError(f"{option} {value} is unknown; it is one of {', '.join(known)}")
    if request.name is not None and not manifest.is_bundle_name(request.name):
        raise UsageError(f"--name {request.name!r} may hold a-z, 0-9, '.', '_' and '-' only, 64 at most")
    output = request.output
    if not output.name or not output.parent.is_dir():
        raise ConversionError(f"{output.parent} is not a folder; the bundle {output} cannot be made in it")
    if not os.path.lexists(output):
        return
    if not request.force:
        raise ConversionError(f"{output} exists; choose another place, or replace it with --force")
    if (
        output.is_symlink()
        or not output.is_dir()
        or (any(output.iterdir()) and not (output / manifest.FILE_NAME).is_file())
    ):
        raise ConversionError(f"{output} is not a bundle; --force replaces nothing else")


def _draft(request: Request, parts: Parts, llm: LanguageModel) -> Manifest:
    """The manifest without what only the finished files tell."""
    raw = template(request.family)
    raw["image"]["size"] = parts.image_size or raw["image"]["size"]
    tokens, width = onnx.shape_of_tokens(parts, raw["image"]["size"])
    raw |= {
        "schema": manifest.SCHEMA,
        "name": request.name or raw["name"],
        "sources": [],
        "image_tokens": tokens,
        "width": width,
        "weight_types": {
            "vision": request.vision_type,
            "projector": "f32",
            "llm": weights.llm_type(llm, request.quant),
        },
        "agreement": {},
        "warnings": [],
        "files": [],
        "self_test": json.loads(json.dumps(asdict(_NO_SELF_TEST))),
    }
    draft = cast(Manifest, typed_json.build(Manifest, raw, f"models/{request.family}/template.json:"))
    first = {variant.before_ids[:1] for variant in draft.prompt.variants.values()}
    if first != {(llm.bos,)} or llm.eos not in draft.prompt.stop_ids:
        raise ConversionError(
            f"the vocabulary of {llm.path} begins a text with id {llm.bos} and ends it with {llm.eos}; the "
            f"prompts of {request.family} use {sorted(first)} and {draft.prompt.stop_ids}: they do not belong together"
        )
    return draft


def _identity(request: Request, draft: Manifest, files: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """All that decides about the result, as JSON; a file by its place, size and time.

    What was chosen counts beside what was asked for: on another CPU the same request may choose otherwise.
    """
    images = () if request.check_images is None else compare.image_files(request.check_images)
    stats = [(role, str(path.resolve()), path.stat()) for role, path in (*files, *(("image", path) for path in images))]
    return {
        "schema": manifest.SCHEMA,
        "family": request.family,
        "name": request.name,
        "quant": request.quant,
        "weight_types": dict(draft.weight_types),
        "version": __version__,
        "settings": dict(request.settings),
        "files": [(role, path, stat.st_size, stat.st_mtime_ns) for role, path, stat in stats],
    }


def _export(parts: Parts, draft: Manifest, folder: Path) -> dict[str, float]:
    """The float32 graphs, and how far they differ from torch."""
    onnx.export_parts(parts, draft.image.size, folder)
    return onnx.agreement(onnx.reference(parts, draft.image.size), Bundle(folder, draft, ""))


def _shortfall(request: Request, figures: Mapping[str, float], staging: Staging) -> tuple[str, ...]:
    """What every answer of the bundle has to say about its encoder; refused unless forced."""
    lacking = compare.shortfall(figures) if "cosine_mean" in figures else None
    if lacking is None:
        return ()
    if not request.force:
        raise staging.refusal(
            f"with --vision-type {request.vision_type} {lacking}; use --vision-type f32, name a folder of your own "
            "radiographs with --check-images, or write it nevertheless with --force"
        )
    return (f"this bundle's encoder was made with --vision-type {request.vision_type} by force: {lacking}",)


def _self_test(bundle: Bundle) -> SelfTest:
    try:
        with open_bundle(bundle, device="cpu") as model:
            return verify.record(model)
    except BundleError as error:
        raise ConversionError(f"the converted model does not run as a bundle: {error}") from error


def _hashed(draft: Manifest, folder: Path, files: Sequence[tuple[str, Path]], progress: Progress) -> Manifest:
    """The manifest with the hashes of the bundle's files and of the source files."""
    made, hashes = sorted(folder.iterdir()), _Hashes()
    size = sum(path.stat().st_size for path in [*made, *(path for _, path in files)])
    progress.counting(lambda: hashes.done, size, "bytes")
    return replace(
        draft,
        files=tuple(FileEntry(path.name, hashes.of(path), path.stat().st_size) for path in made),
        sources=tuple(SourceFile(role, path.name, hashes.of(path)) for role, path in files),
    )
