"""Makes a tiny Llama GGUF with a SentencePiece vocabulary for tests: random weights, seeded, in about a second.

Weights are scaled so that the logits differ clearly and depend on every earlier row. Nothing here is checked against
another implementation; the converters' golden tests do that.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import sentencepiece

WIDTH, LAYERS, HEADS, FEED_FORWARD, TRAINED_CONTEXT = 256, 2, 4, 512, 512

TEXT = (
    "the chest x-ray shows no pleural effusion pneumothorax mild cardiomegaly lungs are clear heart size is "
    "normal findings impression right left lower lobe opacity consolidation oedema atelectasis ###Patient: "
    "###Doctor: <Img> "
)


@dataclass(frozen=True)
class Tiny:
    """The made files and what went into them."""

    gguf: Path
    sentencepiece: bytes
    token_embeddings: np.ndarray


def train_vocabulary(size: int = 384) -> bytes:
    """Train a SentencePiece BPE model with byte fallback, as Llama's is, on seeded nonsense."""
    rng = np.random.default_rng(5)
    sentences = [" ".join(rng.choice(TEXT.split(), 12)) + "." for _ in range(200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def make(folder: Path, *, width: int = WIDTH, seed: int = 3, vocabulary: bytes | None = None) -> Tiny:
    """Write `tiny.gguf` (float32) into the folder."""
    vocabulary = vocabulary or train_vocabulary()
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(TRAINED_CONTEXT)
    writer.add_embedding_length(width)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(width // HEADS)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_vocabulary(writer, processor)
    tensors = _tensors(processor.get_piece_size(), width, np.random.default_rng(seed))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tiny(path, vocabulary, tensors["token_embd.weight"])


def _add_vocabulary(writer: gguf.GGUFWriter, processor: sentencepiece.SentencePieceProcessor) -> None:
    size = processor.get_piece_size()
    kinds = gguf.TokenType
    types = [
        kinds.UNKNOWN
        if processor.is_unknown(i)
        else kinds.CONTROL
        if processor.is_control(i)
        else kinds.BYTE
        if processor.is_byte(i)
        else kinds.NORMAL
        for i in range(size)
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i).encode() for i in range(size)])
    writer.add_token_scores([processor.get_score(i) for i in range(size)])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def _tensors(vocab: int, width: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    def random(rows: int, columns: int, scale: float) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)

    tensors = {"token_embd.weight": random(vocab, width, np.sqrt(width))}
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"{block}{name}.weight"] = np.ones(width, np.float32)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"{block}{name}.weight"] = random(width, width, 1.5)
        for name in ("ffn_gate", "ffn_up"):
            tensors[f"{block}{name}.weight"] = random(FEED_FORWARD, width, 1.0)
        tensors[f"{block}ffn_down.weight"] = random(width, FEED_FORWARD, 1.5)
    tensors["output_norm.weight"] = np.ones(width, np.float32)
    tensors["output.weight"] = random(vocab, width, 3.0)
    return tensors
