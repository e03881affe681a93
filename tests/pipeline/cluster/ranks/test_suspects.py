"""Which rows are to blame for a bad step."""

import numpy as np

from pipeline.cluster.ranks.suspects import suspects


def test_the_rows_to_blame_are_named() -> None:
    keys = np.arange(32, dtype=np.uint8).reshape(2, 16)
    good, bad = np.ones((2, 3), np.float32), np.array([[1.0, 2.0], [np.inf, 0.0]], np.float16)
    batch = {"key": keys, "image": np.zeros((2, 3, 4, 4), np.uint8), "text": good}
    assert suspects([{**batch, "latents_c": bad}]) == f"numbers that are not finite in {bytes(keys[1]).hex()}"
    assert suspects([batch]).startswith(f"all numbers are finite in its pictures {bytes(keys[0]).hex()}, ")
    many = {"key": np.zeros((20, 16), np.uint8), "text": np.zeros((20, 1), np.float32)}
    assert suspects([many]).endswith(" and 12 more")
