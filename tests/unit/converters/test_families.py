"""Families of other sizes and seeds than the published ones; settings, swapped and strange files, weights apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx as onnx_format
import pytest
import torch
from make_checkpoints import EVA, GRID, LARGE, PATCH, QFORMER, released
from torch import Tensor
from torch.nn import functional as F

from xraygpt_lite import verify
from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.converters import onnx
from xraygpt_lite.converters.assemble import Request, convert, template
from xraygpt_lite.converters.families import Parts, loader
from xraygpt_lite.errors import ConversionError, UsageError
from xraygpt_lite.values import Bundle

WIDTH = 64
SETTINGS = {"vision.num_heads": "4", "qformer.num_heads": "2", "vision.image_size": str(GRID * PATCH)}
MED_SETTINGS = {"vision.num_heads": "4", "vision.image_size": str(LARGE * PATCH)}


@pytest.fixture(autouse=True, scope="module")
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """eva.pth, qformer.pth, linear.pth, med.pth and med_plain.pth; see `make_checkpoints.released`."""
    return released(tmp_path_factory.mktemp("released"), WIDTH)


@pytest.fixture
def inputs(files: Path) -> dict[str, Path]:
    return {"vision": files / "eva.pth", "qformer": files / "qformer.pth", "checkpoint": files / "linear.pth"}


@pytest.fixture
def med(files: Path) -> dict[str, Path]:
    return {"vision": files / "eva.pth", "checkpoint": files / "med.pth"}


def graphs(parts: Parts, folder: Path) -> Bundle:
    """A family's graphs in a folder, and as much of a manifest as running them needs."""
    size = parts.image_size or 0
    onnx.export_parts(parts, size, folder)
    tokens, width = onnx.shape_of_tokens(parts, size)
    from tiny_bundle import plain_manifest

    manifest = plain_manifest()
    image = replace(manifest.image, size=size)
    return Bundle(folder, replace(manifest, image=image, image_tokens=tokens, width=width), "")


def test_a_q_former_of_other_sizes_is_read_off_its_tensors(inputs: dict[str, Path], tmp_path: Path) -> None:
    parts = loader("xraygpt")(inputs, WIDTH, SETTINGS)
    pixels = torch.randn(3, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(1))
    stored = torch.load(inputs["vision"], weights_only=True)
    patches = slow_vit({name: value.float() for name, value in stored.items()}, pixels, heads=4)
    query = torch.load(inputs["qformer"], weights_only=True)["model"]
    expected = slow_qformer({name: value.float() for name, value in query.items()}, patches, heads=2)
    np.testing.assert_allclose(parts.vision(pixels).numpy(), expected.numpy(), rtol=0, atol=1e-4)
    assert expected.shape == (3, QFORMER.queries, QFORMER.hidden)
    bundle = graphs(parts, tmp_path)
    assert max(onnx.agreement(onnx.reference(parts, GRID * PATCH), bundle).values()) <= onnx.TOLERANCE


@pytest.mark.parametrize("checkpoint", ["med.pth", "med_plain.pth"])
def test_joined_patches_of_another_size(med: dict[str, Path], files: Path, tmp_path: Path, checkpoint: str) -> None:
    parts = loader("minigpt-med")(med | {"checkpoint": files / checkpoint}, WIDTH, MED_SETTINGS)
    pixels = torch.randn(2, 3, LARGE * PATCH, LARGE * PATCH, generator=torch.Generator().manual_seed(2))
    state = {name: value.float() for name, value in torch.load(med["vision"], weights_only=True).items()}
    square = state["pos_embed"][:, 1:].reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(LARGE, LARGE), mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], resized.flatten(2).transpose(1, 2)], 1)
    own = torch.load(files / checkpoint, weights_only=True)["model"]
    weight, bias = own.get("ln_vision.weight"), own.get("ln_vision.bias")
    patches = F.layer_norm(slow_vit(state, pixels, heads=4), (EVA.width,), weight, bias, 1e-5)[:, 1:]
    expected = torch.stack([torch.cat([image[n : n + 4].flatten()[None] for n in range(0, len(image), 4)])
                            for image in patches])  # fmt: skip
    np.testing.assert_allclose(parts.vision(pixels).numpy(), expected.numpy(), rtol=0, atol=1e-4)
    assert (parts.lora is None) == (checkpoint == "med_plain.pth")
    bundle = graphs(parts, tmp_path)
    assert bundle.manifest.image_tokens == LARGE * LARGE // 4
    assert max(onnx.agreement(onnx.reference(parts, LARGE * PATCH), bundle).values()) <= onnx.TOLERANCE


@pytest.mark.parametrize(("family", "size"), [("xraygpt", 224), ("minigpt4", 224), ("minigpt-med", 448)])
def test_the_published_image_size_stands_in_template_and_code(family: str, size: int) -> None:
    from importlib import import_module

    module = import_module(f"xraygpt_lite.converters.families.{'minigpt_med' if size == 448 else 'xraygpt'}")
    assert template(family)["image"]["size"] == module.IMAGE_SIZE == size


@pytest.mark.parametrize("family", ["xraygpt", "minigpt4", "minigpt-med", "xraygpt-paper"])
def test_a_record_says_greedy_where_nothing_else_was_asked_for(family: str) -> None:
    published = template(family)
    greedy = {name: value for name, value in published["presets"]["greedy"].items() if value is not None}
    assert published["defaults"] | greedy == published["defaults"]
    assert published["defaults"]["preset"] == "greedy"


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("xraygpt", {}, r"eva.pth is 40 wide, which heads of the published 88 .* --set vision.num_heads=N"),
        ("xraygpt", {"vision.num_heads": "3"}, r"vision.num_heads=3 does not divide 40, the width of .*eva.pth"),
        ("xraygpt", {"qformer.num_heads": "5"}, r"qformer.num_heads=5 does not divide 32, the width of .*qformer.pth"),
        ("xraygpt", {"vision.image_size": "30"}, r"image_size=30 is no multiple of 8, the patches' size"),
        ("minigpt-med", {"vision.image_size": "24"}, r"24 x 24 pixels have 9 patches, which are no multiple of 4"),
    ],
)
def test_sizes_that_cannot_be(
    inputs: dict[str, Path], med: dict[str, Path], family: str, settings: dict[str, str], message: str
) -> None:
    given = dict(SETTINGS if family == "xraygpt" else MED_SETTINGS) if settings else {}
    with pytest.raises(ConversionError, match=message):
        loader(family)(inputs if family == "xraygpt" else med, WIDTH, given | settings)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("xraygpt", {"lora.alpha": "16"}, r"no such setting; it has: vision.num_heads, qformer.num_heads, vision.im"),
        ("minigpt-med", {"qformer.num_heads": "4"}, r"no such setting; it has: vision.num_heads, vision.image_size, l"),
        ("minigpt4", {"vision.num_heads": "2,4"}, r"expected one positive integer"),
        ("minigpt-med", {"lora.alpha": "-1"}, r"lora.alpha=-1: expected one positive number"),
        ("minigpt-med", {"lora.alpha": "nan"}, r"expected one positive number"),
    ],
)
def test_settings_that_cannot_be_meant(
    inputs: dict[str, Path], med: dict[str, Path], family: str, settings: dict[str, str], message: str
) -> None:
    given, base = (med, MED_SETTINGS) if family == "minigpt-med" else (inputs, SETTINGS)
    with pytest.raises(UsageError, match=message):
        loader(family)(given, WIDTH, base | settings)


@pytest.mark.parametrize(
    ("family", "role", "file", "message"),
    [
        ("xraygpt", "vision", "qformer.pth", r"--vision .*qformer.pth is BLIP-2's Q-Former.* It belongs to --qformer$"),
        ("xraygpt", "qformer", "eva.pth", r"--qformer .*eva.pth is the EVA-CLIP ViT.* It belongs to --vision$"),
        ("minigpt4", "qformer", "linear.pth", r"--qformer .* is the linear layer .* It belongs to --checkpoint$"),
        ("minigpt-med", "vision", "med.pth", r"--vision .*med.pth is MiniGPT-Med's .* It belongs to --checkpoint$"),
        ("xraygpt", "checkpoint", "medclip.bin", r"is MedCLIP with its Swin encoder; .* `convert xraygpt-paper`$"),
        ("xraygpt", "vision", "medclip.bin", r"is MedCLIP with its Swin encoder; .* `convert xraygpt-paper`$"),
        ("minigpt4", "vision", "medclip.bin", r"use `convert xraygpt-paper`$"),
        ("minigpt-med", "vision", "medclip.bin", r"use `convert xraygpt-paper`$"),
        ("xraygpt", "checkpoint", "med.pth", r"is MiniGPT-Med's checkpoint; xraygpt expects .* `convert minigpt-med`$"),
        ("minigpt4", "checkpoint", "med.pth", r"use `convert minigpt-med`$"),
        ("xraygpt-paper", "checkpoint", "med.pth", r"use `convert minigpt-med`$"),
        ("xraygpt-paper", "vision", "eva.pth", r"use `convert xraygpt`, `convert minigpt4` or `convert minigpt-med`$"),
        ("minigpt-med", "vision", "qformer.pth", r"use `convert xraygpt` or `convert minigpt4`$"),
        ("minigpt-med", "checkpoint", "qformer.pth", r"use `convert xraygpt` or `convert minigpt4`$"),
        ("xraygpt", "checkpoint", "llama.pth", r"is a Llama language model; .* It belongs to --llm$"),
        ("xraygpt", "vision", "grid.pth", r"is nih-tiny's encoder; .* `convert nih-tiny`$"),
        ("nih-tiny", "vision", "eva.pth", r"use `convert xraygpt`, `convert minigpt4` or `convert minigpt-med`$"),
        # The layers alone look alike; their width tells them apart.
        ("xraygpt", "checkpoint", "med_plain.pth", r"has shape \(64, 160\) and the vision file gives 32 features: this "
         r"is the layer of another model than xraygpt.* It is fed by four joined .*: use `convert minigpt-med`$"),
        ("xraygpt", "checkpoint", "paper.pth", r"fed by MedCLIP \(512 wide\): use `convert xraygpt-paper`$"),
        ("minigpt4", "checkpoint", "paper.pth", r"fed by MedCLIP \(512 wide\): use `convert xraygpt-paper`$"),
        ("minigpt-med", "checkpoint", "paper.pth", r"fed by MedCLIP \(512 wide\): use `convert xraygpt-paper`$"),
        ("minigpt-med", "checkpoint", "published.pth", r"a Q-Former \(768 wide\): use `convert xraygpt` or `convert m"),
        ("minigpt-med", "checkpoint", "linear.pth", r"and the vision file gives 160 .* `convert xraygpt-paper` for"),
    ],
)  # fmt: skip
def test_another_family_s_file_is_refused_with_the_command_to_use(
    files: Path, inputs: dict[str, Path], family: str, role: str, file: str, message: str
) -> None:
    given = dict(inputs) | ({"checkpoint": files / "med.pth"} if family == "minigpt-med" else {})
    if family == "xraygpt-paper" and role == "checkpoint":
        given["vision"] = files / "medclip.bin"
    settings = {"xraygpt-paper": {}, "nih-tiny": {}, "minigpt-med": MED_SETTINGS}.get(family, SETTINGS)
    with pytest.raises(ConversionError, match=message):
        loader(family)(given | {role: files / file}, WIDTH, settings)


@pytest.mark.parametrize("family", ["xraygpt", "minigpt4", "minigpt-med"])
def test_a_language_model_of_half_the_width_is_refused(
    inputs: dict[str, Path], med: dict[str, Path], family: str
) -> None:
    given, settings = (med, MED_SETTINGS) if family == "minigpt-med" else (inputs, SETTINGS)
    with pytest.raises(ConversionError, match=r"gives 64 values and the language model is 32 wide; .* another size"):
        loader(family)(given, WIDTH // 2, settings)


def test_a_checkpoint_without_lora_says_so_and_takes_no_alpha(med: dict[str, Path], files: Path) -> None:
    plain = med | {"checkpoint": files / "med_plain.pth"}
    (note,) = loader("minigpt-med")(plain, WIDTH, MED_SETTINGS).notes
    assert note.endswith("med_plain.pth holds no LoRA: the language model stays as it is")
    assert loader("minigpt-med")(med, WIDTH, MED_SETTINGS | {"lora.alpha": "8"}).notes == ()
    with pytest.raises(UsageError, match=r"lora.alpha=16: .*med_plain.pth holds no LoRA"):
        loader("minigpt-med")(plain, WIDTH, MED_SETTINGS | {"lora.alpha": "16"})


@pytest.mark.parametrize("width", [512, 768, 5632])
def test_the_paper_s_command_names_the_family_of_another_width(files: Path, width: int) -> None:
    from xraygpt_lite.converters.checkpoint import Checkpoint
    from xraygpt_lite.converters.families.linear import projector

    torch.save({"model": {"llama_proj.weight": torch.ones(WIDTH, width)}}, files / f"wide{width}.pth")
    named = {512: r"`convert xraygpt-paper` for", 768: r"use `convert xraygpt` or `convert minigpt4`$",
             5632: r"use `convert minigpt-med`$"}  # fmt: skip
    with pytest.raises(ConversionError, match="use " if width != 512 else "Use the command") as caught:
        projector(Checkpoint(files / f"wide{width}.pth"), "xraygpt-paper", 40, WIDTH)
    if width != 512:
        assert caught.match(named[width])


def damaged(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path, Path], None]:
    """Writes a checkpoint anew with its tensors changed."""

    def write(source: Path, target: Path) -> None:
        root = torch.load(source, weights_only=True)
        change(root.get("model", root))
        torch.save(root, target)

    return write


def truncated(source: Path, target: Path) -> None:
    data = source.read_bytes()
    target.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("role", "damage", "message"),
    [
        ("vision", truncated, r"x.pth is truncated or not a torch checkpoint"),
        ("vision", damaged(lambda s: s.pop("blocks.1.attn.v_bias")), r"x.pth lacks 'blocks.1.attn.v_bias'"),
        ("vision", damaged(lambda s: s.pop("pos_embed")), r"x.pth lacks 'pos_embed'"),
        ("vision", damaged(lambda s: s["blocks.0.attn.q_bias"].fill_(torch.nan)), r"q_bias' of .*x.pth .* not finite"),
        ("vision", damaged(lambda s: s["blocks.1.norm1.bias"].fill_(torch.inf)), r"norm1.bias' of .* not finite"),
        ("vision", damaged(lambda s: s.update({"blocks.1.attn.q_bias": torch.ones(3)})), r"q_bias' .* shape \(3,\);"),
        ("vision", damaged(lambda s: s.update({"pos_embed": torch.ones(1, 8, 40)})), r"7 positions .* a square number"),
        ("vision", damaged(lambda s: s.update({"cls_token": torch.ones(1, 1, 3)})), r"cls_token' .* \(1, 1, 40\)"),
        ("vision", damaged(lambda s: s.update({"extra": torch.ones(1)})), r"x.pth holds 'extra', which this family"),
        ("qformer", truncated, r"x.pth is truncated or not a torch checkpoint"),
        ("qformer", damaged(lambda s: s.pop("ln_vision.bias")), r"x.pth lacks 'ln_vision.bias'"),
        ("qformer", damaged(lambda s: s.pop("query_tokens")), r"x.pth lacks 'query_tokens'"),
        ("qformer", damaged(lambda s: s["query_tokens"].fill_(torch.nan)), r"'query_tokens' of .*x.pth .* not finite"),
        ("qformer", damaged(lambda s: s.pop(f"{LAYER3}.output.dense.bias")), r"x.pth lacks 'Qformer.*layer.3.crossatt"),
        ("qformer", damaged(lambda s: s.update({LAYER3.replace("3", "4") + ".self.key.bias": torch.ones(32)})),
         r"layers \[0, 3, 4\] of the 5 in .*x.pth have crossattention"),
        ("qformer", damaged(lambda s: s.update({f"{LAYER0}.crossattention.self.key.weight": torch.ones(32, 41)})),
         r"looks at patches 41 wide; --vision gives 40"),
        ("checkpoint", damaged(lambda s: s["llama_proj.bias"].fill_(torch.inf)), r"llama_proj.bias' .* not finite"),
        ("checkpoint", damaged(lambda s: s.update({"other.weight": torch.ones(1)})), r"x.pth holds 'other.weight'"),
        ("checkpoint", damaged(lambda s: s.update({"llama_proj.weight": torch.ones(65, 32)})), r"gives 65 values and"),
    ],
)  # fmt: skip
def test_damaged_files_are_named_with_their_tensor(
    inputs: dict[str, Path], tmp_path: Path, role: str, damage: Callable[[Path, Path], None], message: str
) -> None:
    damage(inputs[role], tmp_path / "x.pth")
    with pytest.raises(ConversionError, match=message):
        loader("xraygpt")(inputs | {role: tmp_path / "x.pth"}, WIDTH, SETTINGS)


def test_buffers_of_frozen_parts_do_not_mislead(inputs: dict[str, Path], tmp_path: Path) -> None:
    buffers = {
        "Qformer.bert.embeddings.position_ids": torch.arange(4)[None],
        "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    damaged(lambda state: state.update(buffers))(inputs["checkpoint"], tmp_path / "x.pth")
    parts = loader("xraygpt")(inputs | {"checkpoint": tmp_path / "x.pth"}, WIDTH, SETTINGS)
    assert set(buffers) <= set(parts.ignored)


def test_half_precision_is_computed_in_float32(inputs: dict[str, Path], tmp_path: Path) -> None:
    for role, path in inputs.items():
        root = torch.load(path, weights_only=True)
        state = root.get("model", root)
        state.update({name: value.half() for name, value in state.items() if value.is_floating_point()})
        torch.save(root, tmp_path / f"{role}.pth")
    parts = loader("xraygpt")({role: tmp_path / f"{role}.pth" for role in inputs}, WIDTH, SETTINGS)
    modules = (parts.vision, parts.projector)
    assert {each.dtype for module in modules for each in module.state_dict().values()} == {torch.float32}


def test_weights_above_the_limit_lie_in_one_listed_file(
    inputs: dict[str, Path], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "LARGEST_GRAPH", 30_000)
    request = Request("xraygpt", inputs | {"llm": made / "llm"}, tmp_path / "b", quant="f32", settings=SETTINGS)
    convert(request)
    bundle = store.load(tmp_path / "b", Cache(None))
    listed = {entry.name: entry.size for entry in bundle.manifest.files}
    assert set(listed) == {"vision.onnx", "vision.onnx_data", "projector.onnx", "llm.gguf"}
    assert listed["vision.onnx"] < listed["vision.onnx_data"]
    assert (bundle.manifest.image.size, bundle.manifest.image_tokens) == (GRID * PATCH, QFORMER.queries)
    assert [check.detail for check in verify.run(bundle.folder, device="cpu") if check.status != "ok"] == []
    graph = onnx_format.load(bundle.vision, load_external_data=False).graph
    offsets = [int(entry.value) for tensor in graph.initializer for entry in tensor.external_data
               if entry.key == "offset"]  # fmt: skip
    assert offsets
    assert {offset % onnx.PAGE for offset in offsets} == {0}


def test_a_file_for_each_tensor_becomes_one_file(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above 2 GB torch writes each tensor to a file of its own, which is imitated here."""
    export = onnx._export

    def in_pieces(*arguments: object) -> None:
        export(*arguments)  # type: ignore[arg-type]
        path = arguments[2]
        model = onnx_format.load(path)
        onnx_format.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=False)

    monkeypatch.setattr(onnx, "_export", in_pieces)
    monkeypatch.setattr(onnx, "LARGEST_GRAPH", 30_000)
    parts = loader("xraygpt")(inputs, WIDTH, SETTINGS)
    bundle = graphs(parts, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{part}.onnx{end}" for part in ("vision", "projector") for end in ("", "_data")}
    assert max(onnx.agreement(onnx.reference(parts, GRID * PATCH), bundle).values()) <= onnx.TOLERANCE


LAYER0, LAYER3 = "Qformer.bert.encoder.layer.0", "Qformer.bert.encoder.layer.3.crossattention"


def slow_vit(state: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    """EVA's ViT, plainly: (B, 3, S, S) → (B, 1 + P, W)."""
    width = state["cls_token"].shape[-1]
    weight = state["patch_embed.proj.weight"]
    patches = F.conv2d(pixels, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    rows = torch.cat([state["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    rows = rows + state["pos_embed"]
    for n in range(EVA.depth):
        block = {name.removeprefix(f"blocks.{n}."): value for name, value in state.items()}
        normed = F.layer_norm(rows, (width,), block["norm1.weight"], block["norm1.bias"], 1e-6)
        q, k, v = (normed @ part.T for part in block["attn.qkv.weight"].split(width))
        mixed = attention(q + block["attn.q_bias"], k, v + block["attn.v_bias"], heads)
        rows = rows + F.linear(mixed, block["attn.proj.weight"], block["attn.proj.bias"])
        normed = F.layer_norm(rows, (width,), block["norm2.weight"], block["norm2.bias"], 1e-6)
        inner = F.gelu(F.linear(normed, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
        rows = rows + F.linear(inner, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
    return rows


def slow_qformer(state: dict[str, Tensor], patches: Tensor, heads: int) -> Tensor:
    """`ln_vision` and the query side of the Q-Former, plainly: (B, 1 + P, W) → (B, Q, H)."""
    seen = F.layer_norm(patches, patches.shape[-1:], state["ln_vision.weight"], state["ln_vision.bias"], 1e-5)

    def linear(name: str, rows: Tensor) -> Tensor:
        return F.linear(rows, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, rows.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    rows = norm("Qformer.bert.embeddings.LayerNorm", state["query_tokens"].expand(len(patches), -1, -1))
    for n in range(QFORMER.layers):
        layer = f"Qformer.bert.encoder.layer.{n}"
        looks = {"attention": None, "crossattention": seen}
        for part, other in looks.items():
            if f"{layer}.{part}.self.query.weight" not in state:
                continue
            source = rows if other is None else other
            q, k, v = (linear(f"{layer}.{part}.self.{name}", row)
                       for name, row in (("query", rows), ("key", source), ("value", source)))  # fmt: skip
            rows = norm(f"{layer}.{part}.output.LayerNorm",
                        rows + linear(f"{layer}.{part}.output.dense", attention(q, k, v, heads)))  # fmt: skip
        inner = F.gelu(linear(f"{layer}.intermediate_query.dense", rows))
        rows = norm(f"{layer}.output_query.LayerNorm", rows + linear(f"{layer}.output_query.dense", inner))
    return rows


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Plain attention of (B, n, W) on (B, m, W)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    shares = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (shares @ v).transpose(1, 2).flatten(2)
