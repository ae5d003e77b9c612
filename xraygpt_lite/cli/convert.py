"""`xraygpt-lite convert`: a published checkpoint → a bundle; one subcommand a family."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from xraygpt_lite.cli import console
from xraygpt_lite.errors import MissingPackageError, UsageError

NEEDED = ("torch", "transformers", "optimum", "onnx", "gguf", "sentencepiece", "google.protobuf", "safetensors")
QUANTS = ("f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
FAMILIES = {
    "xraygpt-paper": (
        "XrayGPT as its paper describes it: MedCLIP, one linear layer, Vicuna.",
        "MedCLIP's pytorch_model.bin, with the Swin or the ResNet-50 encoder.",
        "The trained linear layer (llama_proj).",
    ),
    "nih-tiny": (
        "This project's own small model, from its training run.",
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


def _add(family: str, title: str, vision: str, checkpoint: str) -> None:
    """Add one family's subcommand; all take the same options."""

    @command.command(family, help=title, short_help=title)
    @click.option("--vision", required=True, type=click.Path(exists=True, path_type=Path), help=vision)
    @click.option("--checkpoint", required=True, type=click.Path(exists=True, path_type=Path), help=checkpoint)
    @click.option(
        "--llm", required=True, type=click.Path(exists=True, path_type=Path),
        help="Hugging Face Llama folder: config.json, tokenizer.model, weights as safetensors or .bin.",
    )  # fmt: skip
    @click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle's new folder.")
    @click.option("--quant", type=click.Choice(QUANTS), default="f16", show_default=True, help="The LLM's weight type.")
    @click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="A size, e.g. vision.num_heads=3,6,12,24.")
    @click.option("--name", help="The bundle's name; by default the family's.")
    @click.option("--force", is_flag=True, help="Replace a bundle that is there.")
    def run(
        vision: Path,
        checkpoint: Path,
        llm: Path,
        output: Path,
        quant: str,
        pairs: tuple[str, ...],
        name: str | None,
        force: bool,
    ) -> None:
        settings = _settings(pairs)
        _require_packages()
        from xraygpt_lite.converters import assemble

        inputs = {"vision": vision, "checkpoint": checkpoint, "llm": llm}
        request = assemble.Request(family, inputs, output, quant, settings, name, force)
        outcome = assemble.convert(request, lambda step: click.echo(f"{step} …", err=True))
        if outcome.ignored:
            click.echo(f"ignored, as nothing uses them: {_shortened(outcome.ignored)}", err=True)
        manifest = outcome.bundle.manifest
        figures = ", ".join(f"{key} {value:.1e}" for key, value in manifest.agreement.items())
        megabytes = sum(entry.size for entry in manifest.files) / 1e6
        console.out(f"{output}: {manifest.name}, {megabytes:.1f} MB, id {outcome.bundle.id[:12]} ({figures})\n")


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
            f"converting needs {', '.join(missing)}, which the extra 'convert' installs; "
            "run: pip install 'xraygpt-lite[convert]'"
        )


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is absent
        return False


def _shortened(names: tuple[str, ...]) -> str:
    """Names with their numbers replaced by *, each once."""
    short = [".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names]
    return ", ".join(f"{name} ({count})" if (count := short.count(name)) > 1 else name for name in dict.fromkeys(short))


for _family, _texts in FAMILIES.items():
    _add(_family, *_texts)
