"""What a record and its input are known by: digests, salted where names are to stay out of the output.

Knows names, sizes and times, opens no input. The salt lies beside the output (`OUT.salt`, readable by its owner only):
with it the same inputs get the same keys again, without it nobody can try names.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

from xraygpt_lite.batch.durable import beside, replace
from xraygpt_lite.errors import XrayError

_BYTES = 32
_SHOWN = 16  # hex digits: among a million inputs two labels are the same once in 30 million runs


class Keys:
    """Digests of one run's inputs.

    Parameters
    ----------
    salt
        32 random bytes, or None: names may be seen, and anybody can compute the digests.
    """

    def __init__(self, salt: bytes | None) -> None:
        self._salt = salt

    @property
    def fingerprint(self) -> str | None:
        """What tells one salt from another, without telling anything about it; None without a salt."""
        return None if self._salt is None else self._digest("salt")[:_SHOWN]

    def file(self, name: str, stat: os.stat_result | None) -> str:
        """Of a file as it lies there: the input's name, size and time of change; `None`: they cannot be had."""
        return self._digest("file", name, stat and [stat.st_size, stat.st_mtime_ns])

    def key(self, name: str, sha256: str | None, question: str) -> str:
        """Of a record: the input's name, the hex sha256 of its content (None: not read), and the question."""
        return self._digest("key", name, sha256, question)

    def label(self, name: str) -> str:
        """What an input is called in the output: its name, or with a salt "input-" and 16 hex digits."""
        return name if self._salt is None else f"input-{self._digest('label', name)[:_SHOWN]}"

    def _digest(self, *parts: object) -> str:
        data = json.dumps(parts).encode("ascii")  # keeps the parts apart, and writes names that are no text as well
        if self._salt is None:
            return hashlib.sha256(data).hexdigest()
        return hmac.new(self._salt, data, hashlib.sha256).hexdigest()


def read_salt(output: Path) -> bytes | None:
    """The salt beside an output, None where there is none.

    Raises
    ------
    XrayError
        What lies there is no salt.
    """
    path = beside(output, ".salt")
    try:
        with path.open("rb") as file:
            salt = file.read(_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(salt) != _BYTES:
        raise XrayError(f"{path.name} is no salt of {_BYTES} bytes; put the right one back, or remove it and --restart")
    return salt


def write_salt(output: Path, salt: bytes) -> None:
    """Put a salt beside an output, for its owner only."""
    replace(beside(output, ".salt"), [salt], 0o600)


def new_salt() -> bytes:
    return secrets.token_bytes(_BYTES)
