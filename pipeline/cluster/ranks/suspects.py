"""Which rows are to blame for a bad step."""

from collections.abc import Iterable, Mapping

import numpy as np

KEYS_SHOWN = 8  # of a bad batch


def suspects(batch: Iterable[Mapping[str, np.ndarray]]) -> str:
    """Which rows of a bad step's batch are to blame, in words: those with a number that is not finite, else any.

    The batch comes in parts.
    """
    keys, flags = list[str](), list[np.ndarray]()
    for part in batch:
        keys += [bytes(key).hex() for key in part["key"]]
        flags.append(np.ones(len(part["key"]), bool))
        for values in part.values():
            if np.issubdtype(values.dtype, np.floating):
                flags[-1] &= np.isfinite(values).reshape(len(values), -1).all(axis=1)
    finite = np.concatenate(flags)
    poor = [key for key, good in zip(keys, finite, strict=True) if not good]
    few = (poor or keys)[:KEYS_SHOWN]
    what = "numbers that are not finite in" if poor else "all numbers are finite in its pictures"
    more = len(poor or keys) - len(few)
    return f"{what} {', '.join(few)}{f' and {more} more' if more else ''}"
