"""The flags of `run` and `plan` that choose steps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """Which of the needed steps a run may touch (`--from --until --only --force`); names of steps."""

    start: str | None = None
    until: str | None = None
    only: str | None = None
    force: tuple[str, ...] = ()

    @property
    def bounds(self) -> dict[str, str]:
        """The flags that are given of those that leave steps out, with their steps."""
        flags = {"--from": self.start, "--until": self.until, "--only": self.only}
        return {flag: step for flag, step in flags.items() if step is not None}
