"""`xraygpt-lite convert`: a published checkpoint → a bundle; one subcommand a family."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from xraygpt_lite.cli import console, interrupt
from xraygpt_lite.cli.progress import Bar
from xraygpt_lite.errors import MissingPackageError, UsageError

NEEDED = (
    "torch", "transformers", "optimum", "onnx", "gguf", "sentencepiece", "google.protobuf", "safetensors", "filelock",
    "onnxruntime",
)  # fmt: skip
_F = TypeVar("_F", bound=Callable[..., Any])
QUANTS = ("auto", "f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs")
VISION_TYPES = ("f32", "f16", "int8")


class Family(NamedTuple):
    """What a family's command says: the short title, what is to be known, and its files; no Q-Former is None."""

    title: str
    about: str
    vision: str
    checkpoint: str
    qformer: str | None = None


_EVA = "The EVA-CLIP ViT (eva_vit_g.pth)."
_QFORMER = "BLIP-2's file with the Q-Former, ln_vision and the queries (blip2_pretrained_flant5xxl.pth)."
_ALIKE = (
    "The files of XrayGPT and MiniGPT-4 look alike and cannot be told apart: take care to convert each with its own "
    "command and its own Vicuna, for prompt and language model differ."
)
FAMILIES = {
    "xraygpt": Family(
        "The released XrayGPT: ViT-g, Q-Former, one linear layer, Vicuna.",
        f"{_ALIKE} Sizes that tensors cannot tell: vision.num_heads, qformer.num_heads, vision.image_size.",
        _EVA,
        "XrayGPT's checkpoint (llama_proj).",
        _QFORMER,
    ),
    "minigpt4": Family(
        "MiniGPT-4: ViT-g, Q-Former, one linear layer, Vicuna v0.",
        f"{_ALIKE} Sizes that tensors cannot tell: vision.num_heads, qformer.num_heads, vision.image_size.",
        _EVA,
        "MiniGPT-4's checkpoint (llama_proj).",
        _QFORMER,
    ),
    "minigpt-med": Family(
        "MiniGPT-Med: ViT-g at 448 pixels, one linear layer, Llama-2-chat with LoRA.",
        "The LoRA in the checkpoint is merged into the language model. Sizes that tensors cannot tell: "
        "vision.num_heads, vision.image_size, lora.alpha.",
        _EVA,
        "MiniGPT-Med's checkpoint (llama_proj, LoRA, perhaps ln_vision).",
    ),
    "xraygpt-paper": Family(
        "XrayGPT as its paper describes it: MedCLIP, one linear layer, Vicuna.",
        "The size that tensors cannot tell: vision.image_size. Swin's heads stand in its tables: vision.num_heads only "
        "has to agree with them.",
        "MedCLIP's pytorch_model.bin, with the Swin or the ResNet-50 encoder.",
        "The trained linear layer (llama_proj).",
    ),
    "nih-tiny": Family(
        "This project's own small model, from its training run.",
        "It has no sizes to set.",
        "The encoder's safetensors file.",
        "The projector's safetensors file.",
    ),
}


@click.group("convert")
def command() -> None:
    """Make a bundle from a published checkpoint.

    Needs the packages of the extra [convert]. Nothing is written unless every tensor is accounted for and the exported
    graphs agree with torch.
    """


def _input_options(texts: Family) -> Callable[[_F], _F]:
    """--vision, --checkpoint and, where the family has one, --qformer."""

    def add(function: _F) -> _F:
        given = {"--vision": texts.vision, "--qformer": texts.qformer, "--checkpoint": texts.checkpoint}
        for name, text in reversed(given.items()):
            if text is not None:
                path = click.Path(exists=True, path_type=Path)
                function = click.option(name, required=True, type=path, help=text)(function)
        return function

    return add


def _llm_options(function: _F) -> _F:
    """--llm, or --llm-base and --llm-delta; --tokenizer."""
    help_ = {
        "--llm": "Hugging Face Llama folder (config.json, tokenizer.model, weights as safetensors or .bin), or a GGUF. "
        "A delta, as Vicuna's first weights are, is no model alone: give it as --llm-delta.",
        "--llm-base": "The Hugging Face folder that --llm-delta is added to; both instead of --llm.",
        "--llm-delta": "Folder of a delta, as Vicuna was published: base + delta is the language model.",
        "--tokenizer": "A tokenizer.model, where the language model's folders have none.",
    }
    for name, text in reversed(help_.items()):
        function = click.option(name, type=click.Path(exists=True, path_type=Path), help=text)(function)
    return function


def _add(family: str, texts: Family) -> None:
    """Add one family's subcommand; all take the same options, but --qformer."""

    @command.command(family, help=f"{texts.title}\n\n{texts.about}", short_help=texts.title)
    @_input_options(texts)
    @_llm_options
    @click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle's new folder.")
    @click.option(
        "--quant", type=click.Choice(QUANTS), show_default="auto; a GGUF keeps its own",
        help="The LLM's weight type; auto is q4_k_m from a billion weights on, or what is known to be faster on this "
        "CPU (see `doctor`), and q8_0 below.",
    )  # fmt: skip
    @click.option(
        "--vision-type", type=click.Choice(VISION_TYPES), default="f32", show_default=True,
        help="The encoder's weight type: int8 for CPUs, f16 for GPUs.",
    )  # fmt: skip
    @click.option(
        "--check-images", metavar="DIR", type=click.Path(path_type=Path),
        help="Radiographs that smaller weight types are compared on; by default the installed examples, which are "
        "synthetic.",
    )  # fmt: skip
    @click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="A size, e.g. vision.num_heads=16.")
    @click.option("--name", help="The bundle's name; by default the family's.")
    @click.option("--force", is_flag=True, help="Replace a bundle; allow too lossy an encoder.")
    def run(
        output: Path,
        quant: str | None,
        vision_type: str,
        check_images: Path | None,
        pairs: tuple[str, ...],
        name: str | None,
        force: bool,
        **paths: Path | None,
    ) -> int:
        settings = _settings(pairs)
        _require_packages()
        inputs = {role.replace("_", "-"): path for role, path in paths.items() if path is not None}
        try:
            with interrupt.heard():
                from xraygpt_lite.converters import assemble

                request = assemble.Request(
                    family, inputs, output, quant, vision_type, settings, name, force, check_images
                )
                with Bar() as bar:
                    outcome = assemble.convert(request, bar)
        except KeyboardInterrupt as cut:
            console.error(str(cut) or "interrupted")
            return 130
        if outcome.ignored:
            click.echo(f"ignored, as nothing uses them: {_shortened(outcome.ignored)}", err=True)
        for note in outcome.notes:
            click.echo(f"note: {note}", err=True)
        manifest = outcome.bundle.manifest
        figures = ", ".join(f"{key} {value:.4g}" for key, value in manifest.agreement.items())
        for warning in manifest.warnings:
            console.warn(warning)
        megabytes = sum(entry.size for entry in manifest.files) / 1e6
        console.out(f"{output}: {manifest.name}, {megabytes:.1f} MB, id {outcome.bundle.id[:12]} ({figures})\n")
        return 0


def _settings(pairs: tuple[str, ...]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value) or key in settings:
            raise UsageError(f"--set {pair}: expected KEY=VALUE, each key once")
        settings[key] = value
    return settings


def _require_packages() -> None:
    missing = [name for name in NEEDED if not _found(name)]
    if missing:
        raise MissingPackageError(
            f"converting needs {', '.join(missing)}; run: pip install 'xraygpt-lite[cpu,convert]' (or 'cuda,convert' "
            "with an NVIDIA GPU)"
        )


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is absent
        return False


def _shortened(names: tuple[str, ...]) -> str:
    """Names with the numbers of their parts replaced by *, as in `layer*.bn*.bias`, each once."""
    short = [re.sub(r"\d+(?=\.|$)", "*", name) for name in names]
    return ", ".join(f"{name} ({count})" if (count := short.count(name)) > 1 else name for name in dict.fromkeys(short))


for _family, _texts in FAMILIES.items():
    _add(_family, _texts)
