"""The rows of a prompt's fixed text before the image, kept from one process to the next in the user's cache folder.

They are the same for every radiograph and run, and at seven billion parameters they take seconds to prefill. Only what
an engine calls an opening comes here: never a question's or an image's rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from ..cache import Cache
from ..values import DevicePlan, UInt8
from .library import build_id
from .selftest import cpu_id

_KIND = "openings"


class Openings:
    """States of one bundle, build of llama.cpp, CPU and form of KV cache; for the engines of one process.

    Parameters
    ----------
    cache
        Bounded, atomic, and done without where it cannot be written.
    bundle, plan
        The bundle's id, and where it runs: what the rows depend on beside build, CPU and their token ids.
    """

    def __init__(self, cache: Cache, bundle: str, plan: DevicePlan) -> None:
        self._cache = cache
        # Not the context's length: rows do not depend on it, so `summarize` and a batch share them.
        self._model = f"{bundle} {build_id()} {cpu_id()} {plan.gpu_layers} {plan.float32_cache} {plan.batch}"
        # Those that are not there are looked for once in a process, and each is written once.
        self._missing, self._written = set[bytes](), set[bytes]()

    def get(self, opening: bytes) -> UInt8 | None:
        """The state kept for an opening's token ids, or None."""
        if opening in self._missing:
            return None
        data = self._cache.get_bytes(_KIND, self._key(opening))
        if data is None:
            self._missing.add(opening)
            return None
        return np.frombuffer(data, np.uint8)

    def put(self, opening: bytes, state: Callable[[], UInt8]) -> None:
        """Keep the state of an opening that was not there."""
        if opening in self._written:
            return
        self._written.add(opening)
        self._missing.discard(opening)
        self._cache.put_bytes(_KIND, self._key(opening), state().data)

    def _key(self, opening: bytes) -> str:
        return f"{self._model} {hashlib.sha256(opening).hexdigest()}"
