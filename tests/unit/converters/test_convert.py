"""A conversion ends in a whole bundle or leaves nothing: others' files, swapped arguments, disks that refuse."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx as onnx_library
import pytest
import torch
from gguf import GGUFReader
from onnx import numpy_helper
from safetensors.torch import save_file
from tiny_bundle import plain_manifest
from torch import Tensor, nn

from xraygpt_lite import compare, device, verify
from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.converters import assemble, onnx, precision, weights
from xraygpt_lite.converters.assemble import Request, convert
from xraygpt_lite.converters.families import FAMILIES, Parts, Projector, loader
from xraygpt_lite.converters.families.nih_tiny import GridEncoder, Stage
from xraygpt_lite.errors import ConversionError, UsageError
from xraygpt_lite.model import open_bundle
from xraygpt_lite.values import Bundle

WIDTH = 64


@pytest.fixture
def request_(made: Path, tmp_path: Path) -> Request:
    """A request that would succeed."""
    inputs = {"vision": made / "medclip_resnet.bin", "checkpoint": made / "linear.pth", "llm": made / "llm"}
    (tmp_path / "out").mkdir()
    return Request("xraygpt-paper", inputs, tmp_path / "out" / "bundle", quant="f32")


class Told:
    """The steps that a conversion named, and for each that was counted: (unit, expected, done at its end)."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.counts: dict[str, tuple[str, int, int]] = {}
        self._asked: tuple[Callable[[], int], int, str] | None = None

    def step(self, text: str, *, kept: bool = False) -> None:
        if self._asked is not None:
            done, expected, unit = self._asked
            self.counts[self.steps[-1]] = (unit, expected, done())
            self._asked = None
        self.steps.append(f"{text} (kept)" if kept else text)

    def counting(self, done: Callable[[], int], expected: int, unit: str) -> None:
        assert done() == 0
        self._asked = (done, expected, unit)


def test_every_family_has_a_loader_and_a_command() -> None:
    from xraygpt_lite.cli import convert as command

    assert set(command.FAMILIES) == set(FAMILIES)
    assert command.QUANTS == weights.QUANTS
    assert command.VISION_TYPES == precision.VISION_TYPES
    assert all(callable(loader(family)) for family in FAMILIES)


def test_a_quantized_bundle_replaces_another_only_with_force(request_: Request) -> None:
    told = Told()
    outcome = convert(replace(request_, quant="q8_0", name="mine"), told)
    assert told.steps == [
        "reading names and shapes",
        "exporting vision and projector to ONNX",
        "writing the encoder as f32",
        "writing the language model as q8_0",
        "comparing with what was not made smaller",
        "recording the self-test",
        "hashing",
        "checking the finished bundle",
    ]
    assert {told.counts[step][0] for step in told.steps if step.startswith(("exporting", "writing"))} == {"bytes"}
    assert told.counts["comparing with what was not made smaller"] == ("radiographs", 6, 6)
    unit, expected, hashed = told.counts["hashing"]
    assert (unit, hashed) == ("bytes", expected)
    assert hashed > sum(entry.size for entry in outcome.bundle.manifest.files)
    manifest = outcome.bundle.manifest
    assert (manifest.name, manifest.image_tokens, manifest.width) == ("mine", 1, WIDTH)
    assert manifest.weight_types == {"vision": "f32", "projector": "f32", "llm": "q8_0"}
    assert {"logit_scale", "epoch", "optimizer"} <= set(outcome.ignored)
    assert [path.name for path in request_.output.parent.iterdir()] == ["bundle"]
    with pytest.raises(ConversionError, match=r"exists; .* --force"):
        convert(request_)
    assert store.load(request_.output, Cache(None)).id == outcome.bundle.id
    assert convert(replace(request_, force=True)).bundle.manifest.weight_types["llm"] == "f32"
    assert [path.name for path in request_.output.parent.iterdir()] == ["bundle"]


def test_force_replaces_nothing_but_a_bundle(request_: Request) -> None:
    request_.output.mkdir()
    (request_.output / "precious.txt").write_text("mine")
    with pytest.raises(ConversionError, match=r"is not a bundle; --force replaces nothing else"):
        convert(replace(request_, force=True))
    assert (request_.output / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        ({"vision": "linear.pth"}, "--vision .*linear.pth is the linear layer"),
        ({"vision": "llm"}, "--vision .*llm is a Llama language model; xraygpt-paper expects MedCLIP"),
        ({"checkpoint": "medclip_swin.bin"}, "--checkpoint .* is MedCLIP with its Swin encoder; xraygpt-paper expects"),
        ({"llm": "linear.pth"}, "--llm .*linear.pth is not a folder"),
        ({"vision": "golden.npz"}, "golden.npz is truncated or not a torch checkpoint"),
        ({"vision": "llm/tokenizer.model"}, "tokenizer.model is not a torch checkpoint"),
    ],
)
def test_swapped_arguments_are_named(request_: Request, made: Path, swap: dict[str, str], message: str) -> None:
    inputs = dict(request_.inputs) | {role: made / name for role, name in swap.items()}
    with pytest.raises(ConversionError, match=message):
        convert(replace(request_, inputs=inputs))
    assert list(request_.output.parent.iterdir()) == []


EVA = {"blocks.0.attn.qkv.weight": (6, 2), "blocks.0.attn.q_bias": (2,)}
QFORMER = {"Qformer.bert.encoder.layer.0.attention.self.query.weight": (2, 2), "query_tokens": (1, 4, 2)}
LORA = {
    "llama_proj.weight": (WIDTH, 40),
    "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, 2),
}


@pytest.mark.parametrize(
    ("role", "shapes", "message"),
    [
        ("vision", EVA, "is the EVA-CLIP ViT of the released XrayGPT"),
        ("vision", QFORMER, "is BLIP-2's Q-Former"),
        ("checkpoint", LORA, "is MiniGPT-Med's checkpoint"),
        (
            "checkpoint",
            {"llama_proj.weight": (WIDTH, 768)},
            r"\(64, 768\) and the vision file gives 40 features: .*Q-Former",
        ),
        ("checkpoint", {"llama_proj.weight": (WIDTH + 1, 40)}, "gives 65 values and the language model is 64 wide"),
        ("checkpoint", {"llama_proj.weight": (WIDTH, 40), "llama_proj.bias": (3,)}, "'llama_proj.bias' .* has shape"),
        ("checkpoint", {"something.weight": (2, 2)}, "is of no known kind"),
    ],
)
def test_other_families_are_refused_by_name(
    request_: Request, tmp_path: Path, role: str, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    torch.save({"model": {name: torch.ones(shape) for name, shape in shapes.items()}}, tmp_path / "other.pth")
    with pytest.raises(ConversionError, match=message):
        convert(replace(request_, inputs=dict(request_.inputs) | {role: tmp_path / "other.pth"}))
    assert list(request_.output.parent.iterdir()) == []


def test_an_encoder_that_lacks_or_exceeds_what_is_known_is_refused(made: Path, tmp_path: Path) -> None:
    def load(file: str, change: Callable[[dict[str, Tensor]], object]) -> Parts:
        state = torch.load(made / file, weights_only=True)
        change(state)
        torch.save(state, tmp_path / "x.bin")
        return loader("xraygpt-paper")({"vision": tmp_path / "x.bin", "checkpoint": made / "linear.pth"}, WIDTH, {})

    table = "vision_model.model.encoder.layers.1.blocks.1.attention.self.relative_position_bias_table"
    with pytest.raises(ConversionError, match=r"lacks 'vision_model.model.layernorm.bias'"):
        load("medclip_swin.bin", lambda state: state.pop("vision_model.model.layernorm.bias"))
    with pytest.raises(ConversionError, match=r"lacks .*projection_head"):
        load("medclip_swin.bin", lambda state: state.pop("vision_model.projection_head.weight"))
    with pytest.raises(ConversionError, match=r"holds 'vision_model.model.extra'"):
        load("medclip_swin.bin", lambda state: state.update({"vision_model.model.extra": torch.ones(1)}))
    with pytest.raises(ConversionError, match=r"relative_position_bias_table' .* has shape \(169, 3\); .* \(169, 4\)"):
        load("medclip_swin.bin", lambda state: state.update({table: torch.ones(169, 3)}))
    with pytest.raises(ConversionError, match=r"bn2.running_var' .* not finite"):
        load(
            "medclip_resnet.bin", lambda state: state["vision_model.model.layer1.0.bn2.running_var"].fill_(float("nan"))
        )


def test_settings(made: Path) -> None:
    inputs = {"vision": made / "medclip_swin.bin", "checkpoint": made / "linear.pth"}
    assert loader("xraygpt-paper")(inputs, WIDTH, {"vision.num_heads": "2,4"}).vision is not None
    with pytest.raises(ConversionError, match=r"contradicts .* whose tables have 2,4"):
        loader("xraygpt-paper")(inputs, WIDTH, {"vision.num_heads": "3,6"})
    with pytest.raises(UsageError, match=r"expected positive integers"):
        loader("xraygpt-paper")(inputs, WIDTH, {"vision.num_heads": "2,x"})
    with pytest.raises(UsageError, match=r"no such setting; it has: vision.num_heads, vision.image_size$"):
        loader("xraygpt-paper")(inputs, WIDTH, {"vision.depth": "2"})
    with pytest.raises(ConversionError, match=r"is a ResNet, which has no heads"):
        loader("xraygpt-paper")(inputs | {"vision": made / "medclip_resnet.bin"}, WIDTH, {"vision.num_heads": "2"})


@pytest.mark.parametrize(("file", "size"), [("medclip_swin.bin", 99), ("medclip_resnet.bin", 64)])
def test_graphs_of_another_image_size_compute_what_torch_does(made: Path, tmp_path: Path, file: str, size: int) -> None:
    inputs = {"vision": made / file, "checkpoint": made / "linear.pth"}
    parts = loader("xraygpt-paper")(inputs, WIDTH, {"vision.image_size": str(size)})
    assert parts.image_size == size
    image = replace(plain_manifest().image, size=size)
    bundle = Bundle(tmp_path, replace(plain_manifest(), image=image, image_tokens=1, width=WIDTH), "")
    with torch.no_grad():
        onnx.export_parts(parts, size, tmp_path)
        assert max(onnx.agreement(onnx.reference(parts, size), bundle).values()) <= onnx.TOLERANCE


def test_an_image_size_is_the_bundle_s(request_: Request) -> None:
    image = convert(replace(request_, settings={"vision.image_size": "64"})).bundle.manifest.image
    assert image.size == 64


def test_images_smaller_than_a_window_are_refused(made: Path) -> None:
    inputs = {"vision": made / "medclip_swin.bin", "checkpoint": made / "linear.pth"}  # two stages, patches of 4 x 4
    with pytest.raises(ConversionError, match=r"image_size=48 .* windows of 7 x 7 has; it takes 49 pixels or more"):
        loader("xraygpt-paper")(inputs, WIDTH, {"vision.image_size": "48"})
    smallest = loader("xraygpt-paper")(inputs, WIDTH, {"vision.image_size": "49"})
    assert onnx.shape_of_tokens(smallest, 49) == (1, WIDTH)


def test_graphs_that_differ_from_torch_are_not_kept(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    export = onnx.export_parts

    def export_another(parts: Parts, size: int, folder: Path) -> None:
        with torch.no_grad():
            parts.projector.linear.bias += 0.1  # type: ignore[operator, union-attr]
        export(parts, size, folder)
        with torch.no_grad():
            parts.projector.linear.bias -= 0.1  # type: ignore[operator, union-attr]

    monkeypatch.setattr(onnx, "export_parts", export_another)
    with pytest.raises(ConversionError, match=r"differ from torch: embeddings_max_difference"):
        convert(request_)
    assert list(request_.output.parent.iterdir()) == []


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Limits the size of any file that this process writes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# What is written, in order: vision.onnx (about 40 kB), projector.onnx (10 kB), the language model (600 kB).
@pytest.mark.parametrize(("size", "quant", "kept"), [(5_000, "f32", 0), (200_000, "f32", 4), (200_000, "q8_0", 4)])
def test_a_full_disk_keeps_finished_steps_and_the_same_command_goes_on(
    request_: Request,
    largest_file: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    quant: str,
    kept: int,
) -> None:
    largest_file(size)
    request = replace(request_, quant=quant)
    with pytest.raises(ConversionError, match=r"disk is full"):
        convert(request)
    left = {path.name for path in request.output.parent.rglob("*.*") if path.is_file()}
    assert left == ({"projector.onnx", "vision.onnx", "steps.json"} if kept else set())
    largest_file(resource.RLIM_INFINITY)
    if kept:
        monkeypatch.setattr(onnx, "export_parts", lambda *_: pytest.fail("was exported again"))
    convert(request)
    assert [path.name for path in request.output.parent.iterdir()] == ["bundle"]


def test_too_little_disk_is_said_before_the_work(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    monkeypatch.setattr(onnx, "export_parts", lambda *_: pytest.fail("was begun"))
    with pytest.raises(ConversionError, match=r"has 0\.0 GB free and making bundle takes about"):
        convert(request_)
    assert list(request_.output.parent.iterdir()) == []


@pytest.mark.parametrize("vision_type", ["f16", "int8"])
def test_a_smaller_encoder_is_measured_and_noted(request_: Request, made: Path, vision_type: str) -> None:
    inputs = dict(request_.inputs) | {"vision": made / "medclip_swin.bin"}
    request = replace(request_, inputs=inputs, quant="auto", vision_type=vision_type)
    manifest = convert(request).bundle.manifest
    assert manifest.weight_types == {"vision": vision_type, "projector": "f32", "llm": "q8_0"}
    assert set(compare.FIGURES) <= set(manifest.agreement)
    assert 0.95 < manifest.agreement["cosine_worst"] <= manifest.agreement["cosine_mean"] <= 1
    assert manifest.agreement["images"] == 3
    assert manifest.warnings == ()


@pytest.mark.parametrize(("quant", "known"), [("auto", False), (None, True)])
def test_a_large_language_model_gets_what_is_fast_here(
    request_: Request, monkeypatch: pytest.MonkeyPatch, quant: str | None, known: bool
) -> None:
    """Where its CPU's speeds are known; and four bits anywhere. Of a folder, that is the default, too."""
    monkeypatch.setattr(weights, "LARGE", 0)
    monkeypatch.setattr(device, "cpu_features", lambda: ("avx512f", "amx_int8") if known else ("avx2",))
    monkeypatch.setattr(device, "SPEEDS", {device.TILES: {"q4_k_m": (1.0, 0.7, 1.0), "q4_0": (1.0, 1.0, 0.9)}})
    kept = convert(replace(request_, quant=quant)).bundle.manifest.weight_types["llm"]
    assert kept == ("q4_0" if known else "q4_k_m")


def test_an_encoder_that_lost_too_much_is_refused_or_says_so(
    request_: Request, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(source: Path, target: Path, kind: str) -> None:
        model = onnx_library.load(source)
        for weight in model.graph.initializer:
            values = numpy_helper.to_array(weight)
            if values.dtype == np.float32 and values.ndim > 1:
                spoiled = np.random.default_rng(0).permutation(values.ravel()).reshape(values.shape)
                weight.CopyFrom(numpy_helper.from_array(spoiled, weight.name))
        onnx_library.save(model, target)

    monkeypatch.setattr(precision, "shrink", noisy)
    request = replace(request_, vision_type="int8")
    kept = r"--vision-type int8 the image tokens .* --check-images.* with --force; finished steps are kept in .*partial"
    with pytest.raises(ConversionError, match=kept):
        convert(request)
    assert not request.output.exists()
    told = Told()
    forced = convert(replace(request, force=True), told).bundle.manifest
    assert [step for step in told.steps if step.startswith("recording")] == told.steps[-3:-2]
    assert all(step.endswith("(kept)") for step in told.steps[1:-3])
    assert [path.name for path in request.output.parent.iterdir()] == ["bundle"]
    assert "by force" in forced.warnings[0]
    with open_bundle(store.load(request.output, Cache(None)), device="cpu") as model:
        assert model.summarize(verify.test_radiograph(1)).warnings[: len(forced.warnings)] == forced.warnings


def test_another_name_begins_anew(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"interrupted; finished steps are kept in .*\.bundle\.partial"):
            convert(replace(request_, name="first"))
    told = Told()
    outcome = convert(replace(request_, name="second"), told)
    assert not [step for step in told.steps if step.endswith("(kept)")]
    fields = GGUFReader(outcome.bundle.llm).fields
    assert fields["general.name"].contents() == "second"


def test_another_choice_of_weights_begins_anew(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a conversion with --quant auto goes on upon another CPU."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "measure", interrupted)
        patch.setattr(weights, "llm_type", lambda *_: "f16")
        with pytest.raises(KeyboardInterrupt, match="finished steps are kept"):
            convert(replace(request_, quant="auto"))
    bundle = convert(replace(request_, quant="auto")).bundle
    assert bundle.manifest.weight_types["llm"] == "q8_0"
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(bundle.llm).tensors if len(tensor.shape) > 1}
    assert kinds == {"Q8_0"}


def test_what_radiographs_a_comparison_saw_belongs_to_its_result(request_: Request, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "notes.txt").write_text("no radiograph")
    request = replace(request_, check_images=folder)

    def identity(name: str, content: str) -> str:
        (folder / name).write_text(content)
        return json.dumps(assemble._identity(request, plain_manifest(), []))

    assert len({identity("a.png", "1"), identity("a.png", "22"), identity("b.png", "1")}) == 3
    assert identity("notes.txt", "again") == identity("notes.txt", "another")


def test_a_machine_without_the_memory_compares_no_answers(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_physical_memory", lambda: 1e5)
    told = Told()
    figures = convert(replace(request_, quant="q8_0"), told).bundle.manifest.agreement
    assert "cosine_mean" in figures
    assert not set(weights.ANSWERS) & set(figures)
    assert any("too large for this machine's memory" in step for step in told.steps)


def test_there_an_interrupted_conversion_keeps_its_steps(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_physical_memory", lambda: 1e5)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    wanted = replace(request_, quant="q8_0")
    with monkeypatch.context() as patch:
        patch.setattr(compare, "agreement", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(wanted)
    told = Told()
    convert(wanted, told)
    assert len([step for step in told.steps if step.endswith("(kept)")]) > 2


def test_a_folder_that_cannot_be_written_is_named(request_: Request, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"is not a folder"):
        convert(replace(request_, output=tmp_path / "absent" / "bundle"))
    closed = request_.output.parent
    if os.geteuid() == 0:  # permissions do not bind root; nobody can make a folder here
        closed = Path("/proc")
    else:
        closed.chmod(0o500)
    with pytest.raises(ConversionError, match=r"could not be written"):
        convert(replace(request_, output=closed / "bundle"))


def test_what_cannot_be_meant_is_refused(request_: Request) -> None:
    with pytest.raises(UsageError, match=r"--quant q3"):
        convert(replace(request_, quant="q3"))
    with pytest.raises(UsageError, match=r"--name 'A B'"):
        convert(replace(request_, name="A B"))


def test_grid_encoders_of_other_sizes_are_read_off_their_tensors(tmp_path: Path) -> None:
    torch.manual_seed(3)
    encoder = GridEncoder((Stage(4, 1, 3, 1), Stage(6, 2, 5, 3), Stage(8, 3, 3, 6)), stem=8, features=32).eval()
    projector = nn.Linear(32, 24)
    save_file(encoder.state_dict(), tmp_path / "vision.safetensors")
    save_file(
        {f"projector.{name}": value for name, value in projector.state_dict().items()}, tmp_path / "p.safetensors"
    )
    inputs = {"vision": tmp_path / "vision.safetensors", "checkpoint": tmp_path / "p.safetensors"}
    parts = loader("nih-tiny")(inputs, 24, {})
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = projector(encoder(pixels))
    assert isinstance(parts.projector, Projector)
    np.testing.assert_array_equal(parts.projector(parts.vision(pixels)).numpy(), expected.numpy())
    assert {name for name in parts.ignored if name.startswith("head.")} == {"head.weight", "head.bias"}
    with pytest.raises(ConversionError, match=r"has shape \(24, 32\); .* \(25, 32\)"):
        loader("nih-tiny")(inputs, 25, {})
    with pytest.raises(ConversionError, match=r"--vision .* is nih-tiny's projector"):
        loader("nih-tiny")(inputs | {"vision": inputs["checkpoint"]}, 24, {})
