"""An application that Gunicorn needs to start the process with the `stash`."""

from __future__ import annotations

from typing import Any

from gunicorn.dirty.app import DirtyApp


class Nothing(DirtyApp):  # type: ignore[misc] # Gunicorn has no types
    """An application that does nothing."""

    stashes: list[str] = ["sessions"]  # noqa: RUF012 # as Gunicorn has it

    def __call__(self, action: str, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""
