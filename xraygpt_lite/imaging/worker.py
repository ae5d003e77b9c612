"""A program that reads files for another process: paths come in, the encoder's input goes out.

A decoder that hangs or crashes takes this process with it and nothing else. It knows an ImageSpec; no model, no queue
and no time limit: those are its parent's (`batch.workers`). What passes between the two are frames: the lengths of two
parts, a JSON object in ASCII, raw bytes.

    parent                               worker
    {"parent": pid, "spec": {…}}
                                         {}: it is ready
    {"path": …}
                                         {"sha256": …, or null}: before the decoding, which may be the end of it
                                         {"sha256", "warnings", "sop_instance_uid", "placement"} and uint8 (S, S),
                                         or {"error", "stage", "message"}
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import IO, Any

from xraygpt_lite.errors import XrayError
from xraygpt_lite.values import ImageSpec

_LENGTHS = struct.Struct(">II")
_MOST_BYTES = 2**27
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 64 * 2**20
_OOM_SCORE = 500


def send(stream: IO[bytes], header: dict[str, Any], payload: memoryview | bytes = b"") -> None:
    """Write one frame. Lone surrogates, with which Python spells undecodable paths, pass as JSON escapes."""
    text = json.dumps(header).encode("ascii")
    stream.write(_LENGTHS.pack(len(text), len(payload)) + text)
    stream.write(payload)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytearray]:
    """Read one frame.

    Raises
    ------
    EOFError
        The other side has gone, before or within a frame.
    ValueError
        What came is no frame.
    """
    lengths = _LENGTHS.unpack(_exactly(stream, _LENGTHS.size))
    if max(lengths) > _MOST_BYTES:
        raise ValueError(f"a frame of {lengths} bytes")
    text, payload = (_exactly(stream, length) for length in lengths)
    return json.loads(text), payload


def main() -> None:
    """Answer until the parent closes the pipe."""
    # A terminal, a service manager or a scheduler sends these to all processes of a run. The parent decides what they
    # mean; a worker that they ended would look as if its file had killed it.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests, answers = _own(0, "rb"), _own(1, "wb")
    with suppress(EOFError, BrokenPipeError):  # the parent has ended, or wants no more
        hello, _ = receive(requests)
        if sys.platform == "linux" and not _settle(hello["parent"]):
            return
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in hello["spec"].items()}
        spec = ImageSpec(**fields)
        for name in ("read", "transform"):  # now, when no Ctrl-C can spoil it, and not in the first file's time
            import_module(f"xraygpt_lite.imaging.{name}")
        send(answers, {})
        while True:
            path = receive(requests)[0]["path"]
            send(answers, *_decoded(path, spec, lambda sha256: send(answers, {"sha256": sha256})))


def _decoded(path: str, spec: ImageSpec, loaded: Callable[[str | None], None]) -> tuple[dict[str, Any], memoryview]:
    """Header and payload of the answer; `loaded` is told the file's hash before anything is decoded."""
    from xraygpt_lite.imaging.read import decode, load
    from xraygpt_lite.imaging.transform import fit

    sha256 = None
    try:
        try:
            data = load(path)
            sha256 = hashlib.sha256(data).hexdigest()
        finally:
            loaded(sha256)
        radiograph = decode(data, path, sha256)
        square, placement = fit(radiograph.pixels, spec)
    except XrayError as error:
        return {"error": type(error).__name__, "stage": error.stage, "message": str(error)}, memoryview(b"")
    except Exception as error:  # its own text may quote the file
        name = type(error).__name__
        message = f"{path}: could not be decoded ({name}). Export or copy it again."
        return {"error": name, "stage": "decode", "message": message}, memoryview(b"")
    header = {
        "sha256": radiograph.sha256,
        "warnings": radiograph.warnings,
        "sop_instance_uid": radiograph.sop_instance_uid,
        "placement": vars(placement),
    }
    # Before it is normalized: a twelfth of the memory while it waits for the encoder.
    return header, square.data.cast("B")


def _exactly(stream: IO[bytes], length: int) -> bytearray:
    buffer = bytearray(length)
    if stream.readinto(buffer) < length:  # type: ignore[attr-defined]  # IO lacks it, no buffered reader does
        raise EOFError
    return buffer


def _own(descriptor: int, mode: str) -> IO[Any]:
    """Standard input or output under another number, so that a native library that prints cannot spoil a frame."""
    stream = os.fdopen(os.dup(descriptor), mode)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    return stream


def _settle(parent: int) -> bool:
    """Arrange on Linux to die with the parent, and before it. False: it is dead already."""
    import resource

    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if hasattr(libc, "mallopt"):  # glibc: giving every array back at once costs a third of a PNG's time in page faults
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES // 2)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    with suppress(OSError), open("/proc/self/oom_score_adj", "r+b", buffering=0) as file:
        # Short of memory, the system is to end the process that can be replaced.
        file.write(b"%d" % max(_OOM_SCORE, int(file.read())))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would leave a patient's image behind
    return os.getppid() == parent


if __name__ == "__main__":
    main()
