"""Dotted keys of nested settings."""

from typing import Any


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested mapping; lists are leaves."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def is_below(name: str, key: str) -> bool:
    """Whether a dotted key is another one, or a part of its section."""
    return f"{name}.".startswith(f"{key}.")
