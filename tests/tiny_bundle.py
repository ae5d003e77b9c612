"""A bundle of a few hundred kilobytes that truly runs: random weights, real ONNX graphs, a real Llama GGUF.

`make(folder)` writes it. The same call gives the same weights; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from xraygpt_lite.bundle import manifest, store
from xraygpt_lite.cache import Cache
from xraygpt_lite.values import (
    FileEntry,
    FindingSpec,
    GenerationOptions,
    ImageSpec,
    Manifest,
    PromptSpec,
    PromptVariant,
    Sampling,
    SelfTest,
    SourceFile,
    TaskSpec,
)

SIZE, TOKENS, FEATURES, WIDTH, VOCAB, LAYERS, HEADS, HIDDEN = 32, 4, 8, 32, 352, 2, 2, 64
BOS, EOS = 1, 2
SAYS = (" ChatDoctor sees <p>the", " heart</p> {<10><20", "><50><70>}<delim>{<60><0><100><100>}", " and {<1><2>.")


def make(folder: Path, *, seed: int = 0, width: int = WIDTH, name: str = "tiny", says: tuple[str, ...] = ()) -> Path:
    """Write a whole bundle into `folder`.

    `width` is the projector's alone, to make one that does not fit. With `says`, every answer is these tokens in this
    order, whatever is asked.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    write_vision(folder / "vision.onnx", rng)
    write_projector(folder / "projector.onnx", rng, width)
    write_llm(folder / "llm.gguf", rng, says)
    seal(folder, replace(plain_manifest(name), width=width))
    return folder


def make_talking(folder: Path) -> Path:
    """Write a bundle with tasks, boxes and a replaced word, which says `SAYS`."""
    make(folder, name="talking", says=SAYS)
    plain = plain_manifest("talking")
    tasks = {
        "vqa": TaskSpec("[vqa] {question}", ""),
        "identify": TaskSpec("[identify] {question} {box}", "what is this"),
    }
    prompt = replace(plain.prompt, tasks=tasks, box_grid=100, replaced={"ChatDoctor": "XrayGPT"})
    seal(folder, replace(plain, prompt=prompt))
    return folder


def seal(folder: Path, parsed: Manifest) -> None:
    """Write `bundle.json` with the hashes and sizes of what lies in the folder now."""
    files = tuple(
        FileEntry(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.name != manifest.FILE_NAME
    )
    (folder / manifest.FILE_NAME).write_bytes(manifest.dump(replace(parsed, files=files)))


def record(folder: Path) -> None:
    """Replace the stand-in self-test by what the bundle really answers here."""
    from xraygpt_lite import verify
    from xraygpt_lite.model import open_bundle

    bundle = store.load(folder, Cache(None))
    with open_bundle(bundle, device="cpu") as model:
        seal(folder, replace(bundle.manifest, self_test=verify.record(model)))


def plain_manifest(name: str = "tiny") -> Manifest:
    """A manifest with every field; its self-test is a stand-in and its files have no content."""
    variant = PromptVariant(
        "###Patient: <Img>", "</Img> {question}###Doctor:", "###Patient: {question}###Doctor:", (BOS,)
    )
    prompt = PromptSpec(
        variants={"demo": variant},
        default_variant="demo",
        stops=("###",),
        stop_ids=(EOS,),
        keep_after="Doctor:",
        refused=("###Patient:", "###Doctor:"),
        default_question="What do you see?",
        findings=(FindingSpec("Effusion", "Is there an effusion?", "yes", "no"),),
    )
    return Manifest(
        schema=manifest.SCHEMA,
        name=name,
        family="tiny",
        licence="Apache-2.0",
        intended_use="tests",
        disclaimer="Research use, not a medical device.",
        sources=(SourceFile("weights", "random numbers", "0" * 64),),
        image=ImageSpec(SIZE, "stretch", "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        image_tokens=TOKENS,
        width=WIDTH,
        prompt=prompt,
        defaults=Sampling(max_tokens=16),
        presets={"authors": GenerationOptions(temperature=1.0, top_p=0.9)},
        weight_types={"vision": "f32", "projector": "f32", "llm": "f32"},
        agreement={},
        warnings=(),
        files=tuple(FileEntry(file, "0" * 64, 1) for file in manifest.REQUIRED_FILES),
        self_test=SelfTest(1, (0,), (1.0,), 0.01, "What do you see?", (5,), (2.0,), 1.0),
    )


def write_vision(path: Path, rng: np.random.Generator) -> None:
    """pixels (B, 3, 32, 32) → features (B, 4, 8): one convolution over 16 × 16 patches."""
    weight = rng.normal(0, 0.06, (FEATURES, 3, 16, 16)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["pixels", "weight"], ["grid"], strides=[16, 16]),
        helper.make_node("Reshape", ["grid", "shape"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("Tanh", ["rows"], ["features"]),
    ]
    constants = {"weight": weight, "shape": np.array([0, FEATURES, TOKENS], np.int64)}
    _write_graph(
        path, nodes, constants, ("pixels", ["batch", 3, SIZE, SIZE]), ("features", ["batch", TOKENS, FEATURES])
    )


def write_projector(path: Path, rng: np.random.Generator, width: int = WIDTH) -> None:
    """features (B, 4, 8) → embeddings (B, 4, width): one linear layer."""
    weight = rng.normal(0, 1, (FEATURES, width)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["features", "weight"], ["embeddings"])]
    source, result = ("features", ["batch", TOKENS, FEATURES]), ("embeddings", ["batch", TOKENS, width])
    _write_graph(path, nodes, {"weight": weight}, source, result)


def write_llm(path: Path, rng: np.random.Generator, says: tuple[str, ...] = ()) -> None:
    """A Llama with a SentencePiece vocabulary of control, byte and character tokens, float32.

    With `says`, further tokens that no text merges to; the next token then depends on the last one alone: the first of
    them follows every other token, EOS the last of them.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCAB + len(says))
    kind = gguf.TokenType
    tokens = [("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)]
    tokens += [(f"<0x{byte:02X}>", kind.BYTE) for byte in range(256)]
    tokens += [("\u2581", kind.NORMAL)]
    tokens += [(chr(code), kind.NORMAL) for code in range(33, 33 + VOCAB - len(tokens))]
    tokens += [(piece.replace(" ", "\u2581"), kind.NORMAL) for piece in says]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([int(each) for _, each in tokens])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return rng.normal(0, scale / np.sqrt(columns), (rows, columns)).astype(np.float32)

    embedding, output = matrix(len(tokens), WIDTH, np.sqrt(WIDTH)), matrix(len(tokens), WIDTH, 3.0)
    if says:
        axis = np.zeros(len(tokens), int)
        axis[VOCAB:] = np.arange(1, len(says) + 1)
        embedding, output = np.eye(WIDTH, dtype=np.float32)[axis], np.zeros_like(output)
        output[[*range(VOCAB, len(tokens)), EOS], np.arange(len(says) + 1)] = 10.0
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}{norm}.weight", np.ones(WIDTH, np.float32))
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            silent = bool(says) and part == "attn_output"
            writer.add_tensor(f"{block}{part}.weight", matrix(WIDTH, WIDTH, 0.0 if silent else 1.5))
        writer.add_tensor(f"{block}ffn_gate.weight", matrix(HIDDEN, WIDTH))
        writer.add_tensor(f"{block}ffn_up.weight", matrix(HIDDEN, WIDTH))
        writer.add_tensor(f"{block}ffn_down.weight", matrix(WIDTH, HIDDEN, 0.0 if says else 1.0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    source: tuple[str, list[str | int]],
    result: tuple[str, list[str | int]],
) -> None:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(source[0], TensorProto.FLOAT, source[1])],
        [helper.make_tensor_value_info(result[0], TensorProto.FLOAT, result[1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


if __name__ == "__main__":  # python tests/tiny_bundle.py FOLDER: the bundle that tests/golden/bundles keeps
    make(Path(sys.argv[1]))
    record(Path(sys.argv[1]))
