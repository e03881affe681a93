"""What a check is asked about, and what it finds."""

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.plan.dag import Planned
from pipeline.settings.config import Config
from pipeline.settings.resources import Cluster, Tracking


@dataclass(frozen=True)
class Finding:
    """What one check found: `state` is ok, warning or failed."""

    check: str
    state: str
    found: str


@dataclass(frozen=True)
class Asked:
    """A root, and where a conf is asked about, its plan; of a wrong conf, the sections that are right."""

    root: str
    conf: str | None = None
    config: Config | None = None
    cluster: Cluster | None = None
    tracking: Tracking | None = None
    planned: list[Planned] = field(default_factory=list)
    stored: int | None = None
    """Bytes that the steps to do will store; None: unknown as yet."""

    @property
    def todo(self) -> list[str]:
        """Names of the steps to do."""
        return [item.step.name for item in self.planned if item.state != "done"]


Check = Callable[[Asked], Finding | None]
"""None: there is nothing to look at, for what it is about was not asked."""


def finding(check: str, good: bool, found: str, else_state: str = "failed") -> Finding:
    return Finding(check, "ok" if good else else_state, found)
