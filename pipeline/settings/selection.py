"""The flags of `run` and `plan` that choose steps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """Which of the needed steps a run may touch (`--from --until --only --force`); names of steps."""

    start: str | None = None
    until: str | None = None
    only: str | None = None
    force: tuple[str, ...] = ()
