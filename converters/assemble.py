"""The way from published files to a bundle: load, export, compare, record the self-test, check, put into place.

Everything is made in a folder beside the target and renamed at the end, so the target is a whole bundle or untouched.
Knows the order of the steps and the manifest; what differs between families lies in `families` and in
`models/<family>/template.json`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

from xraygpt_lite import verify
from xraygpt_lite.bundle import manifest, store, typed_json
from xraygpt_lite.cache import Cache
from xraygpt_lite.converters import language, onnx
from xraygpt_lite.converters.families import Parts, loader
from xraygpt_lite.converters.language import LanguageModel
from xraygpt_lite.errors import BundleError, ConversionError, UsageError
from xraygpt_lite.model import open_bundle
from xraygpt_lite.values import Bundle, FileEntry, Manifest, SelfTest, SourceFile

QUANTS = ("f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")

_NO_SELF_TEST = SelfTest(0, (), (), 0.0, "", (), (), 0.0)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
        Weight type of the language model, one of `QUANTS`; None keeps a GGUF as it is and is f16 for a folder.
    settings
        What the family takes with `--set`.
    name
        The bundle's name; None is the family's.
    force
        Replace a bundle that is there.
    """

    family: str
    inputs: Mapping[str, Path]
    output: Path
    quant: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Outcome:
    """The finished bundle, and the entries of the source files that nothing used."""

    bundle: Bundle
    ignored: tuple[str, ...]


def convert(request: Request, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Make a bundle.

    Parameters
    ----------
    say
        Is told each step before it begins.

    Raises
    ------
    ConversionError
        A file does not fit, the graphs differ from torch, or the folder cannot be written; the target is untouched.
    UsageError
        A setting, weight type or name that cannot be meant.
    """
    _check_request(request)
    say("reading names and shapes")
    llm = language.read(request.inputs)
    parts = loader(request.family)(request.inputs, llm.width, request.settings)
    if parts.lora is not None:
        llm.merge(parts.lora)
    draft = _draft(request, parts, llm)
    with _staging(request.output) as folder:
        say("exporting vision and projector to ONNX")
        onnx.export_parts(parts, draft.image.size, folder)
        expected = onnx.reference(parts, draft.image.size)
        parts = parts.unloaded()  # up to 4 GB, which the graphs now hold
        say(f"writing the language model as {draft.weight_types['llm']}")
        llm.write(folder / "llm.gguf", draft.weight_types["llm"], draft.name)
        say("comparing the graphs with torch")
        draft = replace(draft, agreement=onnx.agreement(expected, Bundle(folder, draft, "")))
        say("recording the self-test")
        test = _self_test(Bundle(folder, draft, ""))
        finished = replace(draft, self_test=test, files=_entries(folder), sources=_sources(parts, llm))
        (folder / manifest.FILE_NAME).write_bytes(manifest.dump(finished))
        checked = store.load(folder, Cache(None))
        _put(folder, request.output)
    ignored = (*parts.ignored, *llm.ignored)
    return Outcome(Bundle(request.output, checked.manifest, checked.id), ignored)


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
    if request.quant not in (None, *QUANTS):
        raise UsageError(f"--quant {request.quant} is unknown; it is one of {', '.join(QUANTS)}")
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
        "weight_types": {"vision": "f32", "projector": "f32", "llm": llm.weight_type(request.quant)},
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


def _self_test(bundle: Bundle) -> SelfTest:
    try:
        with open_bundle(bundle, device="cpu") as model:
            return verify.record(model)
    except BundleError as error:
        raise ConversionError(f"the converted model does not run as a bundle: {error}") from error


def _entries(folder: Path) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(path.name, _sha256(path), path.stat().st_size) for path in sorted(folder.iterdir()))


def _sources(parts: Parts, llm: LanguageModel) -> tuple[SourceFile, ...]:
    files = [(role, path) for role, source in parts.sources.items() for path in source.files]
    return tuple(SourceFile(role, path.name, _sha256(path)) for role, path in (*files, *llm.files))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder beside the target, gone at the end whatever happens; what cannot be written becomes one sentence."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        folder.chmod(0o755)
        yield folder
    except OSError as error:
        if error.errno in _FULL or (
            error.errno is None and "requested and" in str(error)
        ):  # the latter: numpy's tofile
            reason = "the disk is full, or a limit on file sizes was reached"
        else:
            reason = error.strerror or str(error)
        raise ConversionError(f"the bundle {output} could not be written: {reason}; nothing was left there") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _put(folder: Path, output: Path) -> None:
    """Rename the finished folder into place; a bundle that is replaced comes back if that fails."""
    if not output.exists():
        folder.rename(output)
        return
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as aside:
        old = Path(aside) / output.name
        output.rename(old)
        try:
            folder.rename(output)
        except OSError:
            old.rename(output)
            raise
