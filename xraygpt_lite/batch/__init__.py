"""Many radiographs through one model: inputs, reading processes, the pipeline, and a journal that loses nothing.

    from xraygpt_lite import batch

    for record in batch.run("archive/", output="summaries.jsonl"):
        ...

Importing it loads nothing: a journal can be read and merged without a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xraygpt_lite.batch.runner import Run, run

__all__ = ["Run", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from xraygpt_lite.batch import runner

    return getattr(runner, name)
