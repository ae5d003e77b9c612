"""Full-size bundles of random weights, made directly: one layer of each kind is quantized and repeated.

    python -m benchmarks.shapes --work DIR [--family F] [--quant T]... [--vision-type T] [--small]

llama.cpp gives the layers of one file different types (Q4_K_M: more bits for v and down in half of them). A tiny model
of as many layers tells which. A GGUF with one layer of each kind is quantized to exactly these types, and its bytes
stand under the names of all layers. The graphs go the converters' own way, from checkpoints in the authors' layouts.
DIR keeps graphs and language models; bundles share them as hard links. What such a model says means nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

from benchmarks import full_size
from benchmarks.full_size import Sizes
from xraygpt_lite import compare, verify
from xraygpt_lite.bundle import manifest, store, typed_json
from xraygpt_lite.cache import Cache
from xraygpt_lite.converters import assemble, onnx, precision, weights
from xraygpt_lite.converters.families import loader
from xraygpt_lite.converters.llama import BLOCK, LlamaFolder
from xraygpt_lite.errors import ConversionError
from xraygpt_lite.imaging.transform import transform
from xraygpt_lite.llm.library import library, log, set_fields
from xraygpt_lite.model import open_bundle
from xraygpt_lite.values import Bundle, DevicePlan, FileEntry, Float32, Manifest, SelfTest
from xraygpt_lite.vision import Encoder

FAMILIES = ("xraygpt", "xraygpt-paper", "minigpt-med")
QUANTS = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs")
SMALL = replace(full_size.SMALL, layers=8)  # with fewer, mixtures lack some kinds of layers
WARNING = "the weights of this bundle are random numbers: it is for measuring speed, and what it says means nothing"
FACTS = "facts.json"
Types = dict[str, GGMLQuantizationType]


def bundle(work: Path, family: str, quant: str, vision_type: str, sizes: Sizes) -> Path:
    """The folder of a bundle, which is made unless it is there.

    Parameters
    ----------
    work
        Holds everything that is kept, of one set of sizes only.
    family, quant, vision_type
        Of `FAMILIES`, `QUANTS` and `precision.VISION_TYPES`.
    """
    name = f"{family}-{quant}-{vision_type}"
    target = work / "bundles" / name
    if target.exists():
        return target
    llm, parts = language_model(work, quant, sizes), graphs(work, family, vision_type, sizes)
    facts = json.loads((parts / FACTS).read_bytes())
    types = {"vision": vision_type, "projector": "f32", "llm": quant}
    draft = replace(_manifest(family, facts, types, sizes.width), name=name)
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=work) as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        for path in (*parts.glob("*.onnx*"), llm):
            os.link(path, folder / ("llm.gguf" if path is llm else path.name))
        say("recording the self-test")
        with open_bundle(Bundle(folder, draft, ""), device="cpu") as model:
            draft = replace(draft, self_test=verify.record(model))
        say("hashing")
        files = tuple(FileEntry(path.name, _sha256(path), path.stat().st_size) for path in sorted(folder.iterdir()))
        (folder / manifest.FILE_NAME).write_bytes(manifest.dump(replace(draft, files=files)))
        store.load(folder, Cache(None))
        folder.rename(target)
    return target


def language_model(work: Path, quant: str, sizes: Sizes) -> Path:
    """`llm/<quant>.gguf` in `work`, which is made unless it is there; the same for all families.

    Raises
    ------
    ConversionError
        llama.cpp failed, or did not give the tensors the types that it gives those of a whole model.
    """
    target = work / "llm" / f"{quant}.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".llm-", dir=work) as temporary:
        folder = Path(temporary)
        say(f"finding out which types {quant} gives to the tensors of {sizes.layers} layers")
        tiny = replace(sizes, width=256, heads=2, feed_forward=256, vocabulary=512)
        quantize(_plain(folder / "tiny", tiny, tiny.layers), folder / "types.gguf", quant)
        types = tensor_types(folder / "types.gguf")
        layers = [tuple(types[f"blk.{n}.{part}.weight"] for part in BLOCK.values()) for n in range(sizes.layers)]
        kinds = list(dict.fromkeys(layers))
        say(f"quantizing embedding, output and {len(kinds)} of {sizes.layers} layers to {quant}")
        wanted = {name: kind for name, kind in types.items() if not name.startswith("blk.")}
        for n, kind in enumerate(kinds):
            wanted |= {f"blk.{n}.{part}.weight": each for part, each in zip(BLOCK.values(), kind, strict=True)}
        quantize(_plain(folder / "layers", sizes, len(kinds)), folder / "quantized.gguf", quant, wanted)
        say("repeating the layers")
        _repeat(folder / "quantized.gguf", folder / "whole.gguf", [kinds.index(kind) for kind in layers])
        if tensor_types(folder / "whole.gguf") != types:
            raise ConversionError(f"the tensors of {target} did not get the types of a whole {quant} model")
        (folder / "whole.gguf").replace(target)
    return target


def tensor_types(path: Path) -> Types:
    """The type of each tensor of a GGUF."""
    return {tensor.name: tensor.tensor_type for tensor in GGUFReader(path).tensors}


def quantize(source: Path, target: Path, quant: str, types: Mapping[str, int] | None = None) -> None:
    """llama.cpp's quantizer, with a type for each tensor that is named; without, it chooses by its own rules."""
    lib, given = library(), types or {}
    overrides = (lib.llama_model_tensor_override * (len(given) + 1))()  # the last one stays empty: the end
    for entry, (name, kind) in zip(overrides, given.items(), strict=False):
        set_fields(entry, pattern=f"^{re.escape(name)}$".encode(), type=int(kind))
    params = lib.llama_model_quantize_default_params()
    set_fields(params, ftype=int(LlamaFileType[f"MOSTLY_{quant.upper()}"]), tt_overrides=overrides)
    mark = log.mark()
    if lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), params) != 0:
        raise ConversionError(f"llama.cpp could not quantize {source.name} to {quant}{log.reason(mark)}")


def _plain(folder: Path, sizes: Sizes, layers: int) -> Path:
    """A float16 GGUF with the first layers of a model of these sizes."""
    torch.manual_seed(0)
    full_size.write_llama(folder, sizes, layers)
    path = folder.with_suffix(".gguf")
    LlamaFolder(folder).write(path, "f16", "random numbers")
    shutil.rmtree(folder)
    return path


def _repeat(source: Path, target: Path, layers: list[int]) -> None:
    """Write a GGUF whose layer n holds the bytes of the source's layer `layers[n]`, one tensor at a time."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue  # the writer's own
        value = len(layers) if field.name == "llama.block_count" else field.contents()
        array = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(field.name, value, field.types[0], sub_type=field.types[-1] if array else None)
    whole = [(tensor.name, tensor) for tensor in reader.tensors if not tensor.name.startswith("blk.")]
    for n, kind in enumerate(layers):
        start = f"blk.{kind}."
        whole += [(f"blk.{n}.{tensor.name.removeprefix(start)}", tensor) for tensor in reader.tensors
                  if tensor.name.startswith(start)]  # fmt: skip
    for name, tensor in whole:
        writer.add_tensor_info(name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in whole:
        writer.write_tensor_data(tensor.data)
    writer.close()


def graphs(work: Path, family: str, kind: str, sizes: Sizes) -> Path:
    """The folder with a family's graphs of one weight type, and what is known of them; made unless it is there."""
    folder = work / "graphs" / f"{family}-{kind}"
    if (folder / FACTS).exists():  # written last
        return folder
    reference = None if kind == "f32" else graphs(work, family, "f32", sizes)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if reference is None:
        facts = _export(folder, family, sizes)
    else:
        say(f"writing the encoder of {family} as {kind}")
        precision.shrink(reference / "vision.onnx", folder / "vision.onnx", kind)
        os.link(reference / "projector.onnx", folder / "projector.onnx")
        facts = json.loads((reference / FACTS).read_bytes())
        seen, expected = (_observe(each, family, facts, sizes.width) for each in (folder, reference))
        figures = compare.agreement(seen, expected)
        facts["agreement"] |= {name: value for name, value in figures.items() if name not in weights.ANSWERS}
    (folder / FACTS).write_text(json.dumps(facts))
    return folder


def _export(folder: Path, family: str, sizes: Sizes) -> dict[str, Any]:
    """Write float32 graphs; the image's size, the number of tokens and how far the graphs differ from torch."""
    with tempfile.TemporaryDirectory(prefix=".checkpoints-", dir=folder.parent) as checkpoints:
        say(f"writing the checkpoints of {family}")
        inputs = full_size.write_vision(Path(checkpoints), family, sizes)
        parts = loader(family)(inputs, sizes.width, {})
        size = parts.image_size or int(assemble.template(family)["image"]["size"])
        say(f"exporting the graphs of {family}")
        onnx.export_parts(parts, size, folder)
        expected = onnx.reference(parts, size)
        del parts  # up to 4 GB, which the graphs now hold
    facts: dict[str, Any] = {"size": size, "tokens": expected[0].embeddings.shape[1], "agreement": {}}
    draft = _manifest(family, facts, {"vision": "f32", "projector": "f32", "llm": ""}, sizes.width)
    return facts | {"agreement": onnx.agreement(expected, Bundle(folder, draft, ""))}


def _observe(folder: Path, family: str, facts: dict[str, Any], width: int) -> list[compare.Observation]:
    """What the graphs make of the example radiographs, with nothing for what a language model would say."""
    draft = _manifest(family, facts, {"vision": "", "projector": "f32", "llm": ""}, width)
    encoder = Encoder(Bundle(folder, draft, ""), DevicePlan(threads=os.cpu_count() or 1))
    nothing: Float32 = np.zeros(2, np.float32)
    try:
        pixels = [transform([radiograph], draft.image) for radiograph in compare.check_images(None)]
        return [compare.Observation(encoder.encode(each).data[0], nothing, ()) for each in pixels]
    finally:
        encoder.close()


def _manifest(family: str, facts: dict[str, Any], types: dict[str, str], width: int) -> Manifest:
    """A manifest that still lacks its files and a true self-test."""
    raw = assemble.template(family)
    raw["image"]["size"] = facts["size"]
    lacking = compare.shortfall(facts["agreement"]) if "cosine_mean" in facts["agreement"] else None
    raw |= {
        "schema": manifest.SCHEMA, "intended_use": "Measuring speed.", "sources": [], "files": [], "width": width,
        "image_tokens": facts["tokens"], "weight_types": types, "agreement": facts["agreement"],
        "warnings": [WARNING] + ([lacking] if lacking else []),
        "self_test": json.loads(json.dumps(asdict(SelfTest(0, (), (), 0.0, "", (), (), 0.0)))),
    }  # fmt: skip
    return cast(Manifest, typed_json.build(Manifest, raw, f"models/{family}/template.json:"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(step: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {step} …", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made and kept")
    parser.add_argument("--family", choices=FAMILIES, default="xraygpt")
    parser.add_argument("--quant", choices=QUANTS, action="append", help="may be given several times; default: q4_k_m")
    parser.add_argument("--vision-type", choices=precision.VISION_TYPES, default="int8")
    parser.add_argument("--small", action="store_true", help="few layers, to try it")
    options = parser.parse_args()
    sizes, work = (SMALL, options.work / "small") if options.small else (full_size.PUBLISHED, options.work)
    work.mkdir(parents=True, exist_ok=True)
    for quant in options.quant or ["q4_k_m"]:
        began = time.perf_counter()
        folder = bundle(work, options.family, quant, options.vision_type, sizes)
        print(f"{folder}  {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
