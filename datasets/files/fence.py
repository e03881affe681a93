"""What stands between somebody who works in a folder and what they say is done there."""

from collections.abc import Callable

Fence = Callable[[], None]  # called right before; raises where the folder has passed to somebody else


def unfenced() -> None:
    """The fence where nobody else writes."""
