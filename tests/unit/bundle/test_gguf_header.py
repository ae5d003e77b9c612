"""The GGUF header reader: right on a real file, a BundleError on any other."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from xraygpt_lite.bundle import gguf_header
from xraygpt_lite.errors import BundleError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "llm.gguf"
    tiny_bundle.write_llm(path, np.random.default_rng(0))
    return path


WIDTH, VOCAB, LAYERS, HIDDEN = tiny_bundle.WIDTH, tiny_bundle.VOCAB, tiny_bundle.LAYERS, tiny_bundle.HIDDEN
TOKEN_BYTES = 4 * (LAYERS * (2 * WIDTH + 4 * WIDTH**2 + 3 * WIDTH * HIDDEN) + WIDTH + VOCAB * WIDTH + WIDTH)
"""Of float32 weights: layers, last norm, output matrix, one row of the embedding table."""


def test_reads_a_real_file(good: Path) -> None:
    assert gguf_header.read(good) == gguf_header.GgufHeader(
        "llama", WIDTH, VOCAB, 512, 4 * LAYERS * WIDTH, LAYERS, TOKEN_BYTES
    )


def test_an_embedding_table_that_is_the_output_matrix_too_is_read_whole(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "llm.gguf"
    path.write_bytes(good.read_bytes().replace(b"output.weight", b"output.absent", 1))
    assert gguf_header.read(path).token_bytes == TOKEN_BYTES + 4 * WIDTH * (VOCAB - 1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_bytes_a_token_of_quantized_weights(kind: str, tmp_path: Path) -> None:
    """Against the sizes that the format's own package tells."""
    path = tmp_path / "llm.gguf"
    shapes = {"blk.0.ffn_down.weight": (64, 96), "token_embd.weight": (50, 64), "output.weight": (50, 64)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(64)
    writer.add_token_list([str(n) for n in range(50)])
    for name, shape in shapes.items():
        data = np.zeros(shape, np.float32)
        writer.add_tensor(name, gguf.quants.quantize(data, gguf.GGMLQuantizationType[kind]),
                          raw_dtype=gguf.GGMLQuantizationType[kind])  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    expected = sizes["blk.0.ffn_down.weight"] + sizes["output.weight"] + sizes["token_embd.weight"] // 50
    assert abs(gguf_header.read(path).token_bytes - expected) <= 3 * 32  # each is padded to 32


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot mmap an empty file"),
        (b"GGU", "does not begin"),
        (b"GGUF", "requires a buffer"),
        (b"PK\x03\x04" + b"\0" * 40, "does not begin"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture is missing"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "items are announced"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "items are announced"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + b"x", "file ends before"),
        (b"GGUF" + struct.pack("<IQQQcIIQQQ", 3, 0, 1, 1, b"k", 9, 8, 2, 2**64 - 1, 0), "too large"),
        (b"GGUF" + struct.pack("<IQQQcIIQQ", 3, 0, 1, 1, b"k", 9, 8, 1, 99), "file ends before"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "value type 9 is unknown"),
    ],
)
def test_refuses(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "llm.gguf"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"llm.gguf is not a readable GGUF file.*{message}"):
        gguf_header.read(path)


def test_refuses_a_table_that_contradicts_the_header(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    at = data.index(b"llama.embedding_length") + len(b"llama.embedding_length") + 4
    path = tmp_path / "llm.gguf"
    path.write_bytes(data[:at] + struct.pack("<I", 64) + data[at + 4 :])
    with pytest.raises(BundleError, match=r"shape \(32, 352\), but the header promises \(64, 352\)"):
        gguf_header.read(path)


def test_refuses_every_truncation_of_the_header(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    end = data.index(b"blk.1.ffn_down.weight")
    path = tmp_path / "llm.gguf"
    for size in range(1, end, 311):
        path.write_bytes(data[:size])
        with pytest.raises(BundleError):
            gguf_header.read(path)


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 9000), patch=st.binary(min_size=1, max_size=8))
def test_only_a_bundle_error_comes_out_of_a_patched_file(
    good: Path, tmp_path_factory: pytest.TempPathFactory, at: int, patch: bytes
) -> None:
    data = good.read_bytes()
    path = tmp_path_factory.getbasetemp() / "patched.gguf"
    path.write_bytes(data[:at] + patch + data[at + len(patch) :])
    try:
        header = gguf_header.read(path)
    except BundleError:
        return
    assert header.width > 0
    assert header.vocab > 0
    assert header.token_bytes >= 0
