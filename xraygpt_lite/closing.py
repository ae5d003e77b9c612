"""What everything that holds native memory or a sequence has in common: it can be closed, and a `with` closes it."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Closing:
    """A context manager that calls the subclass's `close`, which may be called twice."""

    def close(self) -> None:
        """Give back what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
