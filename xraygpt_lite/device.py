"""The only place that chooses where things run: CPU or GPU, threads, context, and the folder for what was measured.

It is told what is there (ONNX Runtime's providers, whether llama.cpp was built for a GPU) and imports neither.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import platformdirs

from xraygpt_lite.errors import DeviceError, UsageError
from xraygpt_lite.values import DevicePlan

Device = Literal["auto", "cpu", "cuda"]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
DEFAULT_CONTEXT = 2048
WORTH = 1.7
"""Twice the threads have to make a decode call so many times as fast, to be better there than at the encoder."""
SMALL = 0.2
"""An encoder that takes less than this share of an answer's time gets no threads of its own, which would be idle."""
TYPICAL_ANSWER = 100
STEP_BYTES = 4_000_000
"""Of weights that a thread must have to read for each token. With less it gains little, and all threads wait for each
other dozens of times a token, which is long where other programs are at work."""
GPU_RESERVE = 768 * 2**20
"""Of a GPU's free memory, kept for compute buffers and the driver."""
TILES, VECTORS = "a CPU with AVX-512 and AMX", "a CPU with AVX-512 VNNI and no AMX"
SPEEDS: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    TILES: {
        "q4_0": (1.0, 1.0, 0.99),
        "q4_k_m": (0.53, 0.63, 0.88),
        "iq4_xs": (0.57, 0.62, 0.87),
        "q8_0": (0.59, 0.81, 1.0),
    },
    VECTORS: {
        "iq4_xs": (0.95, 0.66, 1.0),
        "q4_0": (1.0, 1.0, 0.53),
        "q4_k_m": (0.97, 0.84, 0.63),
        "q8_0": (0.63, 0.84, 0.36),
    },
}
"""Class of CPU → type of a 7B model's weights → tokens a second of one answer, of eight together, and rows a second of
a prompt, as shares of the fastest type's; see docs/performance.md."""
_USES = ("one answer", "eight answers at once", "a prompt")
_SLOW = 0.7
_FEATURES = ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8",
             "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "bf16")  # fmt: skip
_CUDA_ADVICE = "see the installation guide for the CUDA build, or use --device cpu"


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Which vector features that matter here the CPU has; empty where the system does not list them in this file."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            present = set(value.split())
            return tuple(name for name in _FEATURES if name in present)
    return ()


def cpu_class() -> str | None:
    """Which of the classes in `SPEEDS` this CPU belongs to; None: to none."""
    features = set(cpu_features())
    if {"avx512f", "amx_int8"} <= features:
        return TILES
    return VECTORS if "avx512_vnni" in features else None


def slow_weights(kind: str, cpu: str) -> str | None:
    """Where a type of weights has less than 0.7 of the speed that another has on this class of CPU.

    None: nowhere, or it is the fastest in all.
    """
    if kind == _fastest(cpu):
        return None
    shares = zip(SPEEDS[cpu].get(kind, (1.0, 1.0, 1.0)), _USES, strict=True)
    slow = [f"{share:.1f} times as fast as the fastest type for {use}" for share, use in shares if share < _SLOW]
    return f"{', '.join(slow)}; convert with --quant {_fastest(cpu)}, the fastest in all" if slow else None


def best_weights() -> str:
    """The type for a large language model: the fastest where speeds are known, elsewhere the usual four bits."""
    cpu = cpu_class()
    return _fastest(cpu) if cpu else "q4_k_m"


def _fastest(cpu: str) -> str:
    """Of all uses together."""
    return max(SPEEDS[cpu], key=lambda name: sum(SPEEDS[cpu][name]))


def cache_folder() -> Path:
    """Where hashes, measured settings and verdicts are kept: XRAYGPT_LITE_CACHE, else the user's cache folder."""
    named = os.environ.get("XRAYGPT_LITE_CACHE")
    return Path(named) if named else Path(platformdirs.user_cache_dir("xraygpt-lite", appauthor=False))


@dataclass(frozen=True)
class Load:
    """What a bundle would take of a GPU's memory.

    Attributes
    ----------
    layers
        Of the language model, its output layer among them.
    layer_bytes
        Weights and KV cache of one layer, about.
    vision_bytes
        Encoder and projector with what they need to run, about.
    """

    layers: int
    layer_bytes: int
    vision_bytes: int


def plan(
    device: str,
    *,
    providers: Sequence[str],
    llama_gpu: bool,
    trained_context: int,
    threads: int | None = None,
    context: int | None = None,
    sequences: int = 1,
    llm_threads: int | None = None,
    because: Sequence[str] = (),
    token_bytes: int | None = None,
    load: Load | None = None,
    gpu_free: int | None = None,
) -> DevicePlan:
    """Decide what runs where.

    Parameters
    ----------
    device
        "auto" takes the GPU wherever it is to be had and says so; "cuda" and "cpu" are orders.
    providers
        ONNX Runtime's available providers.
    llama_gpu
        Whether llama.cpp was built for a GPU and sees one.
    trained_context
        Longest context that the language model was trained for.
    threads, context
        Explicit values; None chooses: one thread a core, at most 2048 cells.
    sequences
        Conversations and answers that may be open at once; each has a KV cache of its own.
    llm_threads
        The language model's, where the encoder is to have the others and to run at the same time.
    because
        Reasons of the last two, where somebody chose.
    token_bytes
        Of the weights that are read for one token; None: many.
    load, gpu_free
        What the bundle would take, and the bytes that the GPU can give. Where they are not known, all is put there.

    Raises
    ------
    DeviceError
        "cuda" was asked for and one of the two native libraries cannot use it.
    UsageError
        An unknown device, or a number that makes no sense.
    """
    if device not in get_args(Device):
        raise UsageError(f"device {device!r} is unknown; it must be one of: {', '.join(get_args(Device))}")
    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"threads is {threads}; it must lie between 1 and 1024")
    if context is not None and not 16 <= context <= trained_context:
        raise UsageError(f"context is {context}; this language model takes 16 to {trained_context} tokens")
    if not 1 <= sequences <= 256:
        raise UsageError(f"sequences is {sequences}; llama.cpp takes 1 to 256")
    vision_gpu = CUDA in providers
    if device == "cuda" and not (vision_gpu and llama_gpu):
        lacking = [
            name
            for name, there in (("ONNX Runtime has no CUDA provider", vision_gpu), ("llama.cpp sees no GPU", llama_gpu))
            if not there
        ]
        raise DeviceError(f"--device cuda cannot be met: {' and '.join(lacking)}; {_CUDA_ADVICE}")
    use_vision, use_llama = device != "cpu" and vision_gpu, device != "cpu" and llama_gpu
    layers, shortage = -1, ("", "")
    if load and gpu_free is not None and (use_vision or use_llama):
        layers, vision_fits, shortage = _offload(load, gpu_free, use_llama)
        use_vision, use_llama = use_vision and vision_fits, use_llama and layers != 0
        if device == "cuda" and not use_llama:
            raise DeviceError(
                f"--device cuda cannot be met: {gpu_free / 1e9:.1f} GB of the GPU's memory are free, and one layer of "
                f"this model takes {load.layer_bytes / 1e9:.1f} GB; free some, or use --device auto"
            )
    reasons = [
        shortage[0] or _reason("vision", device, vision_gpu, "ONNX Runtime's CUDA provider"),
        shortage[1] or _reason("language model", device, llama_gpu, "a GPU in llama.cpp"),
        f"{threads} threads were asked for" if threads else f"{cores()} threads: one for each core of this process",
    ]
    reasons += because
    used = step_threads = llm_threads or threads or cores()
    engines = min(sequences, copies(threads or cores(), llm_threads, token_bytes))
    if engines > 1:
        each = -(-sequences // engines)
        reasons.append(f"{engines} copies of the language model, with a thread and {each} sequences each")
    if token_bytes is not None and threads is None:
        step_threads = min(used, max(1, round(token_bytes / STEP_BYTES)))
        if step_threads < used:
            reasons.append(f"{step_threads} of them for one answer's steps, which read {token_bytes / 1e6:.1f} MB each")
    return DevicePlan(
        device="cuda" if use_vision or use_llama else "cpu",
        providers=(CUDA, CPU) if use_vision else (CPU,),
        gpu_layers=layers if use_llama else 0,
        threads=used,
        step_threads=step_threads,
        encoder_threads=(threads or cores()) - llm_threads if llm_threads else 0,
        context=context or min(DEFAULT_CONTEXT, trained_context),
        sequences=sequences,
        engines=engines,
        reasons=tuple(reasons),
    )


def _offload(load: Load, free: int, llama: bool) -> tuple[int, bool, tuple[str, str]]:
    """Layers that fit (-1 = all), whether vision does, and what is to be said of what does not, vision first.

    Layers come first: nearly all of an answer's time is theirs, and more of it for each byte than of the encoder's.
    """
    room, told = free - GPU_RESERVE, f"{free / 1e9:.1f} GB of the GPU's memory are free"
    fitting = min(load.layers, max(0, room // load.layer_bytes)) if llama else 0
    left = room - fitting * load.layer_bytes
    whole = fitting == load.layers or not llama
    vision = whole and left >= load.vision_bytes
    return (
        -1 if whole else fitting,
        vision,
        (
            "" if vision else f"vision on the CPU: {told}, and the language model's layers come first",
            "" if whole else f"language model: {fitting} of {load.layers} layers on the GPU: {told}",
        ),
    )


def parallel(
    step_seconds: Mapping[int, Mapping[int, float]],
    encoder_seconds: float,
    sequence_bytes: int,
    free_bytes: int,
    wanted: int | None = None,
) -> tuple[int, int, tuple[str, ...]]:
    """How many answers to write at once, with how many of the threads, and why.

    Parameters
    ----------
    step_seconds
        Threads → number of sequences → seconds of one decode call with a row of each; all threads, and perhaps half of
        them.
    encoder_seconds
        Of one radiograph, with all threads.
    sequence_bytes
        KV cache of one sequence.
    free_bytes
        Memory that may be used.
    wanted
        The number that was asked for; then only the threads are decided.

    Returns
    -------
    int, int, tuple of str
        Of those that fit half of the memory, the smallest number that comes within 3 % of the highest rate. Half of
        the threads where the others would add little and the encoder has something to do: then it has those, and both
        work at the same time.
    """
    threads = max(step_seconds)
    half = min(step_seconds)
    # More threads are never slower by themselves: where they were, others had the processors.
    every = {n: min(seconds, step_seconds[half][n]) for n, seconds in step_seconds[threads].items()}
    fitting = {n: s for n, s in sorted(every.items()) if n * sequence_bytes <= free_bytes / 2} or {1: every[1]}
    rates = {n: n / seconds for n, seconds in fitting.items()}
    chosen = next(n for n, rate in rates.items() if rate >= 0.97 * max(rates.values()))
    told = ", ".join(f"{n}: {rate:.0f}" for n, rate in rates.items())
    reason = f"{chosen} sequences: measured here, tokens a second by sequences: {told}"
    if left := sorted(set(every) - set(rates)):
        reason += f"; {', '.join(map(str, left))} would not fit {free_bytes / 1e9:.1f} GB of free memory"
    if wanted:
        chosen, reason = wanted, f"{wanted} sequences: asked for"
    alike = max(n for n in every if n <= chosen)
    gain = step_seconds[half][alike] / every[alike]
    answer_seconds = TYPICAL_ANSWER * every[alike] / alike
    if half == threads or gain > WORTH or encoder_seconds < SMALL * answer_seconds:
        return chosen, threads, (reason,)
    share = (
        f"{half} of {threads} threads for the language model, the others for the encoder at the same time: all "
        f"{threads} would make a step {gain:.1f} times as fast"
    )
    return chosen, half, (reason, share)


def copies(threads: int, llm_threads: int | None, token_bytes: int | None) -> int:
    """How many copies of a language model work beside its encoder: one for each thread, where one has but one thread.

    They take turns with the encoder's threads as the system lets them, so that no processor is idle. Of a small model
    only, of `token_bytes` a token: each copy has weights of its own.
    """
    small = token_bytes is not None and token_bytes < STEP_BYTES
    return threads if llm_threads == 1 and small else 1


def free_memory() -> int:
    """Bytes that this machine can still give, about; half of all where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def _reason(what: str, device: str, there: bool, needed: str) -> str:
    if device == "cpu":
        return f"{what} on the CPU: asked for"
    if not there:
        return f"{what} on the CPU: {needed} was not found"
    return f"{what} on the GPU: {'asked for' if device == 'cuda' else needed + ' was found'}"
