"""Chest radiographs summarized offline by a quantized vision-language model. Research software, not a medical device.

    >>> import xraygpt_lite
    >>> with xraygpt_lite.load() as model:
    ...     print(model.summarize("radiograph.dcm").text)

Importing this package loads no native library, not even numpy; `load` does.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from xraygpt_lite.errors import (
    BundleError,
    CancelledError,
    ClosedError,
    ContextError,
    ConversionError,
    DeviceError,
    ImageError,
    MissingPackageError,
    NativeError,
    UsageError,
    XrayError,
)

if TYPE_CHECKING:
    from xraygpt_lite.chat import AnswerStream, ChatSession
    from xraygpt_lite.model import XrayModel, load
    from xraygpt_lite.values import Box, Failure, Finding, GenerationOptions, Radiograph, Sampling, Summary

__version__ = "0.1.0"

# ONNX Runtime's wheels report to their maker from their import on, and keep an identifier of the device, unless this is
# set before. Nothing here opens a network connection, whatever the environment says.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

__all__ = [
    "AnswerStream",
    "Box",
    "BundleError",
    "CancelledError",
    "ChatSession",
    "ClosedError",
    "ContextError",
    "ConversionError",
    "DeviceError",
    "Failure",
    "Finding",
    "GenerationOptions",
    "ImageError",
    "MissingPackageError",
    "NativeError",
    "Radiograph",
    "Sampling",
    "Summary",
    "UsageError",
    "XrayError",
    "XrayModel",
    "__version__",
    "load",
]

# name → the module that has it; numpy waits too, so that `--help` need not pay for it
_LAZY = {
    **dict.fromkeys(("AnswerStream", "ChatSession"), "chat"),
    **dict.fromkeys(("XrayModel", "load"), "model"),
    **dict.fromkeys(("Box", "Failure", "Finding", "GenerationOptions", "Radiograph", "Sampling", "Summary"), "values"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
