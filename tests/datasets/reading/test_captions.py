"""Which of a picture's captions is drawn: by weights, the same wherever reading begins and whoever reads."""

from collections import Counter
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.files.storage import CorruptFile
from datasets.formats import shards
from datasets.formats.shards import ImageRow
from datasets.reading import captions
from datasets.reading.batches import Batches, Source
from datasets.reading.captions import Drawn
from datasets.reading.views import View
from tests.datasets.reading.test_batches import image_row, publish, source

PICTURES = [7, 4]  # of each shard
NAMES = ["alt"] * 5 + ["dense"] * 2  # of each picture's captions
WEIGHTS = {"alt": 0.3, "dense": 0.7}


@pytest.fixture
def sources(tmp_path) -> list[Source]:
    """Images, and `text` whose values are 100 * (16 * shard + row) + place among the picture's captions."""
    for shard, count in enumerate(PICTURES):
        rows = [image_row(shard, row) for row in range(count)]
        each = [row for row in rows for _ in NAMES]
        values = [[100.0 * (16 * shard + row.row) + place] for row in rows for place in range(len(NAMES))]
        text = shards.write_tensors(each, "text", np.array(values, np.float32), NAMES * count)
        publish(str(tmp_path / "images"), shard, shards.image_name(shard), shards.write_images(rows), count)
        publish(str(tmp_path / "text"), shard, shards.tensor_name(shard), text, count)
    text_source = source(str(tmp_path / "text"), "text")
    return [source(str(tmp_path / "images"), "image"), Source("text", text_source.shards, captions=WEIGHTS)]


def drawn(batches: Batches, start: int, rows: int) -> list[tuple[int, int]]:
    """Pictures as 16 * shard + row, with the place of the caption."""
    batch = batches.stretch(start, rows)
    places = batch["text"][:, 0] - 100 * batch["key"][:, -1].astype(np.float32)
    return list(zip(batch["key"][:, -1].tolist(), places.astype(int).tolist(), strict=True))


def test_a_picture_comes_once_a_pass_with_one_of_its_own_captions(sources):
    for epoch in range(3):
        found = drawn(Batches(sources, seed=5), epoch * sum(PICTURES), sum(PICTURES))
        assert len({picture for picture, _ in found}) == sum(PICTURES)
        assert {place for _, place in found} <= set(range(len(NAMES)))


def test_the_first_samples_of_a_panel_have_their_first_captions(sources):
    batch = Batches(sources, seed=5).first(sum(PICTURES))
    np.testing.assert_array_equal(batch["text"][:, 0], 100.0 * batch["key"][:, -1])


def test_shares_are_the_weights_within_binomial_bounds(sources):
    passes = 400
    found = drawn(Batches(sources, seed=1), 0, passes * sum(PICTURES))
    counts = Counter(place for _, place in found)
    total, dense = len(found), sum(counts[place] for place in (5, 6))
    assert abs(dense / total - 0.7) < 4 * sqrt(0.7 * 0.3 / total)
    for place, share in [*((place, 0.3 / 5) for place in range(5)), (5, 0.35), (6, 0.35)]:
        assert abs(counts[place] / total - share) < 4 * sqrt(share * (1 - share) / total)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_resuming_anywhere_in_any_world_draws_the_same(sources, world):
    straight = drawn(Batches(sources, seed=3), 0, 80)
    for start in (0, 9, 11, 40):
        ranks = [Batches(sources, seed=3) for _ in range(world)]
        share = 4 // world
        again = [
            sample
            for step in range((80 - start) // 4)
            for rank, batches in enumerate(ranks)
            for sample in drawn(batches, start + 4 * step + rank * share, share)
        ]
        assert again == straight[start : start + len(again)]
    assert drawn(Batches(sources, seed=4), 0, 80) != straight


def test_a_view_draws_of_a_picture_what_the_whole_data_draws_in_that_pass(sources):
    view = View.of({0: [True, False, True, False, False, False, True], 1: [False, True, False, False]})
    whole = set(drawn(Batches(sources, seed=2), 0, sum(PICTURES)))
    assert set(drawn(Batches(sources, seed=2, view=view), 0, view.rows)) < whole


def test_a_picture_without_a_weighted_caption_gives_any_of_its_own():
    values = np.arange(3, dtype=np.float32)[:, None]
    only = Drawn(["a", "a", "b"], ["alt", "alt", "dense"], values, {"dense": 1.0, "alt": 0.0}, seed=0)
    assert only.keys == ["a", "b"]
    assert {only.of(0, epoch)[0] for epoch in range(60)} == {0.0, 1.0}
    assert {only.of(1, epoch)[0] for epoch in range(60)} == {2.0}


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from("abc"), st.floats(0, 10), min_size=1), st.integers(0, 50), st.integers(0, 9))
def test_the_order_of_weights_does_not_matter_and_weight_0_is_not_drawn(weights, epoch, seed):
    names, values = list("aabbc"), np.arange(5)[:, None]
    first, second = (
        Drawn(["k"] * 5, names, values, dict(order), seed).of(0, epoch)[0]
        for order in (weights.items(), reversed(weights.items()))
    )
    assert first == second
    if any(weights.values()):
        assert weights.get(names[first], 0) > 0


def test_tables_of_captions_come_back_and_tensors_without_names_are_refused():
    content = captions.table_bytes([(0, "a" * 32), (2, "b" * 32), (3, "c" * 32)], [["x", "y"], [], ["z"]])
    assert captions.by_key(content) == {"a" * 32: ["x", "y"], "c" * 32: ["z"]}
    row = ImageRow(0, "a" * 32, "u", "one", "png", b"", ("one", "two"))
    others = {"dense": captions.by_key(content), "brief": {"b" * 32: ["no"]}}
    assert list(captions.named(row, others)) == [("alt", "one"), ("alt", "two"), ("dense", "x"), ("dense", "y")]
    with pytest.raises(CorruptFile, match="does not name them"):
        captions.names(shards.write_tensors([row], "text", np.zeros((1, 2), np.float16)))


def test_a_tar_keeps_the_captions_of_a_picture_and_is_what_it_was_without():
    one = ImageRow(0, "a" * 32, "u", "one", "png", b"x", ("one", "two"))
    assert shards.read_images(shards.write_images([one])) == [one]
    plain = ImageRow(0, "a" * 32, "u", "one", "png", b"x")
    assert b"captions" not in shards.write_images([plain])
