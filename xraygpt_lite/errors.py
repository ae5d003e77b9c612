"""Every error that the package raises on purpose, with the exit code that the command line gives it.

    XrayError                    1  anything below; catch this one
    ├── UsageError               2  an option, question or argument that cannot be meant
    ├── ImageError               1  a file that is not a readable radiograph
    ├── BundleError              4  a bundle that fails its checks
    ├── ContextError             1  prompt and answer do not fit the model's context
    ├── DeviceError              1  a device that was asked for and cannot be had
    ├── MissingPackageError      1  an optional package that this feature needs
    ├── NativeError              1  llama.cpp or ONNX Runtime failed, or this build of llama.cpp crashes
    ├── ConversionError          1  a checkpoint that cannot become a bundle
    ├── CancelledError           130  the caller cancelled the request
    └── ClosedError              1  the model was closed

A message says what, where, the value seen, the value expected and the next step, in one sentence or two. It never
carries a DICOM tag's value, pixel data or the text of an answer.
"""

from __future__ import annotations


class XrayError(Exception):
    """Base of every error of this package.

    Attributes
    ----------
    exit_code
        What a command that ends with this error returns to the shell.
    stage
        Where in a radiograph's way it happened: "read", "preprocess", "vision", "prompt", "generate", "load" …; a
        `Failure` record carries it.
    """

    exit_code = 1
    stage = "load"


class UsageError(XrayError):
    """An option, question or argument that cannot be meant; nothing was run."""

    exit_code = 2
    stage = "prompt"


class ImageError(XrayError):
    """A file, array or byte string that is not a readable radiograph."""

    stage = "read"


class BundleError(XrayError):
    """A bundle that is missing, altered, unsafe or of a schema this version cannot read."""

    exit_code = 4


class ContextError(XrayError):
    """Prompt and answer together do not fit the model's context; the message gives the numbers."""

    stage = "prompt"


class DeviceError(XrayError):
    """A device that was asked for by name and cannot be had."""


class MissingPackageError(XrayError):
    """An optional package is absent, or two that exclude each other are present; the message says what to run."""


class NativeError(XrayError):
    """A native library returned an error, or its build does not run on this machine."""

    stage = "generate"


class ConversionError(XrayError):
    """A checkpoint that cannot become a bundle: wrong family, names, shapes or values. Nothing was written."""

    stage = "convert"


class CancelledError(XrayError):
    """The caller cancelled the request before it finished."""

    exit_code = 130
    stage = "generate"


class ClosedError(XrayError):
    """The model, chat or engine was used after it was closed."""
