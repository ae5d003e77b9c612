"""Encoder and projector: the only file that imports onnxruntime.

Two graphs with a free batch axis: `pixels` (B, 3, S, S) → `features` (B, N, F) → `embeddings` (B, N, E). Features stay
where the encoder makes them, on the GPU or not. Knows no text, and nothing of where it would be best to run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from xraygpt_lite.errors import BundleError, DeviceError, MissingPackageError, NativeError
from xraygpt_lite.values import Bundle, DevicePlan, Float32, ImageTokens, Pixels

BATCH = 8
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
CUDA = "CUDAExecutionProvider"


def installed_runtimes() -> dict[str, str]:
    """Installed distributions that provide the module `onnxruntime`, name → version."""
    found = {}
    for name in RUNTIMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _runtime() -> Any:
    found = installed_runtimes()
    if len(found) > 1:
        raise MissingPackageError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other, so CUDA is silently lost; "
            "run: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'xraygpt-lite[cpu]' "
            "or 'xraygpt-lite[cuda]'"
        )
    try:
        import onnxruntime
    except ImportError as error:
        cause: BaseException | None = error
        while cause:
            if isinstance(cause, KeyboardInterrupt):  # it came while a native module was being imported
                raise KeyboardInterrupt from None
            cause = cause.__cause__ or cause.__context__
        for name, version in found.items():
            raise MissingPackageError(
                f"{name} {version} is installed and cannot be imported: {_first_line(error)}; run: pip install "
                f"--force-reinstall {name}=={version}"
            ) from error
        raise MissingPackageError(
            "ONNX Runtime is not installed; run: pip install 'xraygpt-lite[cpu]' "
            "(or 'xraygpt-lite[cuda]' with an NVIDIA GPU)"
        ) from error
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def available_providers() -> tuple[str, ...]:
    """Providers of the installed runtime; what a session really got is `Encoder.providers`.

    Raises
    ------
    MissingPackageError
        No runtime is installed, or both are.
    """
    runtime = _runtime()
    if "onnxruntime-gpu" in installed_runtimes() and hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()
    return tuple(runtime.get_available_providers())


class Encoder:
    """A bundle's encoder and projector, loaded.

    Attributes
    ----------
    providers
        What the encoder's session really runs on, in order.
    batch
        Radiographs that may go through together without changing each other: one where activations are rounded to
        int8 by the range of the whole batch.

    Raises
    ------
    BundleError
        A file is not a graph of this contract, or its shapes are not the manifest's.
    DeviceError
        The GPU was planned and the session did not get it.
    """

    def __init__(self, bundle: Bundle, plan: DevicePlan) -> None:
        self._manifest = bundle.manifest
        self.batch = 1 if bundle.manifest.weight_types["vision"] == "int8" else BATCH
        size, count, width = self._manifest.image.size, self._manifest.image_tokens, self._manifest.width
        self._encoder = open_graph(bundle.vision, plan)
        self._projector = open_graph(bundle.projector, plan)
        return_freed_memory()
        both = {self._encoder.get_providers()[0], self._projector.get_providers()[0]}
        self._between = "cuda" if both == {CUDA} else "cpu"
        self.providers: tuple[str, ...] = tuple(self._encoder.get_providers())
        features = _check_graph(self._encoder, bundle.vision, ("pixels", (3, size, size)), ("features", (None, None)))
        _check_graph(
            self._projector, bundle.projector, ("features", (None, features[-1])), ("embeddings", (count, width))
        )
        if plan.providers[0] not in self.providers:
            raise DeviceError(
                f"{plan.providers[0]} was planned and the session runs on {', '.join(self.providers)}; "
                "install the CUDA libraries that this ONNX Runtime needs, or use --device cpu"
            )

    def encode(self, pixels: Pixels) -> ImageTokens:
        """Pixels float32 (B, 3, S, S) → image tokens float32 (B, N, E).

        Raises
        ------
        NativeError
            ONNX Runtime failed, or gave values that are not finite.
        BundleError
            The result has another shape than the manifest says.
        """
        with _translated():
            rows = self._bound(pixels.data)
        expected = (len(pixels.data), self._manifest.image_tokens, self._manifest.width)
        if rows.shape != expected:
            raise BundleError(
                f"the vision graphs give image tokens of shape {rows.shape}; the manifest says {expected}"
            )
        if not np.isfinite(rows).all():
            raise NativeError(
                "the vision graphs give image tokens that are not finite numbers; run: xraygpt-lite verify"
            )
        return ImageTokens(np.ascontiguousarray(rows, np.float32))

    def features(self, pixels: Pixels) -> Float32:
        """Pixels float32 (B, 3, S, S) → the encoder's features float32 (B, M, F), which the projector takes.

        Raises
        ------
        NativeError
            ONNX Runtime failed.
        """
        with _translated():
            features: Float32 = self._encoder.run(["features"], {"pixels": pixels.data})[0]
        return features

    def _bound(self, data: Float32) -> Float32:
        """Pixels (B, 3, S, S) → embeddings (B, N, E); between the two graphs the features are copied nowhere.

        It was run with features in the CPU's memory only: no GPU was at hand.
        """
        first, second = self._encoder.io_binding(), self._projector.io_binding()
        first.bind_cpu_input("pixels", np.ascontiguousarray(data))
        first.bind_output("features", self._between)
        self._encoder.run_with_iobinding(first)
        first.synchronize_outputs()
        second.bind_ortvalue_input("features", first.get_outputs()[0])
        second.bind_output("embeddings")
        self._projector.run_with_iobinding(second)
        rows: Float32 = second.copy_outputs_to_cpu()[0]
        return rows

    def close(self) -> None:
        """Free both sessions; `encode` must not be called again."""
        self._encoder = self._projector = None


def open_graph(path: Path, plan: DevicePlan) -> Any:
    """One graph as an `onnxruntime.InferenceSession`, set up as the encoder's are.

    Raises
    ------
    BundleError
        ONNX Runtime cannot load it.
    """
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = plan.encoder_threads or plan.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Plans of memory are made for each batch size and kept: a run over many files would grow by them for a while.
    options.enable_mem_pattern = False
    # Threads sleep while there is nothing to encode: the language model needs the cores. Within a call they spin while
    # one waits for another, which saves a sixth of the time; not in a batch, where others want the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(plan.sequences == 1)))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return runtime.InferenceSession(str(path), options, providers=list(plan.providers))
    except Exception as error:  # onnxruntime raises a dozen classes of its own, with no common base
        raise BundleError(f"{path.name} cannot be loaded by ONNX Runtime: {_first_line(error)}") from error


def return_freed_memory() -> None:
    """Give freed heap back to the system; glibc otherwise keeps up to half of a graph's size after it was loaded."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; TypeError is Windows'
        return
    trim(0)


@contextmanager
def _translated() -> Iterator[None]:
    """What ONNX Runtime raises while it runs, as one of our errors."""
    try:
        yield
    except Exception as error:  # as above: no common base class
        raise NativeError(f"ONNX Runtime failed on this bundle's vision graphs: {_first_line(error)}") from error


def _check_graph(
    session: Any, path: Path, source: tuple[str, tuple[int | None, ...]], result: tuple[str, tuple[int | None, ...]]
) -> tuple[Any, ...]:
    """Hold a graph to its contract (None = any size); return the shape of its result behind the batch axis."""
    for values, (name, expected) in ((session.get_inputs(), source), (session.get_outputs(), result)):
        shapes = {value.name: tuple(value.shape) for value in values}
        if list(shapes) != [name] or len(shapes[name]) != len(expected) + 1:
            raise BundleError(
                f"{path.name} has {shapes}; expected one tensor {name!r} with a batch axis and {expected}"
            )
        if isinstance(shapes[name][0], int):
            raise BundleError(f"{path.name}: the batch axis of {name!r} is fixed at {shapes[name][0]}; it must be free")
        for seen, wanted in zip(shapes[name][1:], expected, strict=True):
            if isinstance(seen, int) and wanted is not None and seen != wanted:
                raise BundleError(f"{path.name}: {name!r} has shape {shapes[name]}; the manifest wants {expected}")
    value = session.get_outputs()[0]
    return tuple(size if isinstance(size, int) else None for size in value.shape[1:])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
