"""The order of samples in lanes: arithmetic, whole passes, no rank reads another's shards, and neighbours far apart."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.reading.batches import mixing
from datasets.reading.order import MIXED, Order, Span, places, share_read, span_at


@pytest.mark.parametrize(
    ("counts", "seed", "window", "digest"),
    [
        ({n: 5 + n % 3 for n in range(20)}, 7, 8, "944cc02a5a0e1a334df95266995ac27189817779b3aaf60404ce191fe47bf162"),
        ({0: 5, 1: 3, 3: 4, 4: 1}, 0, 2, "d3a65e75d82803aff6717ee29c77268e2f062caa9d0d11c9465e071f631fcbee"),
        ({4: 9}, 2**32 - 1, 8, "ace53c2f4892a1eda3c73d53e550b18961eb91953a78b0e46e819acc247ce1e1"),
    ],
)
def test_one_lane_is_the_order_of_trainings_that_have_begun(counts, seed, window, digest):
    """Pass, shard and row of three passes, as versions that knew no lanes drew them: such a training goes on."""
    order = Order(counts, seed, window)
    found = np.array(list(order.samples(0, 0, 3 * order.rows)), np.int64)
    assert hashlib.sha256(found.tobytes()).hexdigest() == digest


shards = st.dictionaries(st.integers(0, 200), st.integers(1, 9), min_size=1, max_size=30)


@settings(max_examples=30)
@given(counts=shards, seed=st.integers(0, 2**32 - 1), lanes=st.integers(1, 70), window=st.integers(1, 9))
def test_a_pass_holds_each_row_once_and_lanes_keep_step(counts, seed, lanes, window):
    order, passes = Order(counts, seed, window, lanes), 3
    enough = passes * order.rows // lanes + 2
    taken = [[one for one in order.samples(lane, 0, enough) if one[0] < passes] for lane in range(lanes)]
    every = Counter(itertools.chain(*taken))
    assert set(every) == {(e, s, row) for e in range(passes) for s, count in counts.items() for row in range(count)}
    assert set(every.values()) == {1}
    assert all(samples == sorted(samples, key=lambda sample: sample[0]) for samples in taken)
    for epoch in range(passes):
        done = [sum(sample[0] <= epoch for sample in samples) for samples in taken]
        assert max(done) - min(done) <= 1


@settings(max_examples=25)
@given(counts=shards, seed=st.integers(0, 99), lanes=st.integers(1, 9), start=st.integers(0, 400), data=st.data())
def test_a_lane_can_be_read_from_any_place(counts, seed, lanes, start, data):
    order, lane = Order(counts, seed, 2, lanes), data.draw(st.integers(0, lanes - 1))
    straight = list(order.samples(lane, 0, start + 20))
    assert list(Order(counts, seed, 2, lanes).samples(lane, start, 20)) == straight[start:]


@settings(max_examples=60)
@given(st.integers(1, 16), st.integers(1, 5), st.integers(0, 5), st.data())
def test_a_batch_takes_as_much_of_each_lane(lanes, each, number, data):
    size = lanes * each
    world = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    found = Counter[int]()
    for rank in range(world):
        for lane, place, rows in places(number * size, size, rank * size // world, size // world, lanes):
            assert number * each <= place < place + rows <= (number + 1) * each
            found[lane] += rows
    assert found == dict.fromkeys(range(lanes), each)


def test_a_batch_that_lanes_do_not_divide_is_a_fault_of_ours():
    with pytest.raises(AssertionError, match="a batch of 6 at 12 does not divide among 4 lanes"):
        list(places(12, 6, 0, 6, 4))


def test_another_number_of_lanes_another_seed_and_another_pass_is_another_order():
    counts = dict.fromkeys(range(40), 6)

    def firsts(seed: int, lanes: int, epoch: int = 0) -> list[tuple[int, int]]:
        order = Order(counts, seed, 2, lanes)
        batch = places(epoch * order.rows, 16, 0, 16, lanes)
        return [(shard, row) for stretch in batch for _, shard, row in order.samples(*stretch)]

    assert len({tuple(firsts(*how)) for how in [(0, 1), (0, 2), (0, 8), (1, 8), (0, 8, 1)]}) == 5


def test_phases_are_found_by_their_samples():
    spans = [Span(0, 24, 8), Span(40, 80, 4)]
    assert [span_at(spans, position) for position in (0, 23, 40, 79)] == [0, 0, 1, 1]
    assert spans[1].batch_at(47) == (1, 3)


# ------------------------------------------------------------------------------------------- who reads which shards


def loads(order: Order, world: int, size: int, steps: int) -> int:
    """Shards that all ranks load in so many steps of batches of a size, as `Ahead` holds them."""
    loaded, held = 0, [set[int]() for _ in range(world)]
    for step in range(steps):
        for rank in range(world):
            wanted = set[int]()
            for stretch in places(step * size, size, rank * size // world, size // world, order.lanes):
                wanted |= {shard for window in order.needed(*stretch) for shard in window.shards}
            loaded += len(wanted - held[rank])
            held[rank] = wanted
    return loaded


def data(num_shards: int, rows: int) -> dict[int, int]:
    """Shards of nearly the same number of rows: some pictures were lost."""
    lost = np.random.default_rng(0).integers(0, rows // 4, num_shards)
    return {shard: rows - int(count) for shard, count in enumerate(lost)}


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 32, 64])
def test_each_shard_is_read_about_once_a_pass_by_worlds_that_divide_the_lanes(world):
    counts, passes = data(1600, 16), 2
    order = Order(counts, 0, 2, lanes=64)
    steps = passes * order.rows // 64
    assert loads(order, world, 64, steps) <= 1.1 * passes * len(counts) + 2 * 2 * 64  # and what is read ahead


@pytest.mark.parametrize(("world", "times"), [(1, 1), (6, 1.0625), (48, 1.5), (64, 1), (128, 2)])
def test_other_worlds_read_what_they_share_again(world, times):
    counts = data(800, 16)
    order = Order(counts, 0, 2, lanes=64)
    assert share_read(64, world) == times
    found = loads(order, world, 384, order.rows // 384) / len(counts)
    assert found <= times * 1.25 + 0.3
    assert share_read(1, world) == world


# ------------------------------------------------------------------------------------------- how far it is shuffled


def apart(sequence: Sequence[tuple[int, int]]) -> float:
    """How far neighbours of a shard end up apart in a sequence of (shard, row), on average."""
    place = {sample: number for number, sample in enumerate(sequence)}
    distances = [abs(place[s, row + 1] - at) for (s, row), at in place.items() if (s, row + 1) in place]
    return float(np.mean(distances))


def by_webdataset(counts: Mapping[int, int], seed: int) -> Iterator[tuple[int, int]]:
    """What one reader gets of its shards by webdataset's own shuffles: of 100 shards, then of 1,000 samples."""
    from random import Random

    from webdataset.filters import _shuffle

    shards = _shuffle(iter(counts), bufsize=100, initial=100, rng=Random(seed))
    yield from _shuffle(
        ((shard, row) for shard in shards for row in range(counts[shard])), bufsize=1000, initial=100, rng=Random(seed)
    )


@pytest.mark.parametrize("rows", [256, 2048, 10_000])
def test_neighbours_of_a_shard_end_up_as_far_apart_as_webdatasets_usual_buffer_leaves_them(rows):
    """In what one rank reads, with a lane of its own; more ranks or lanes take both as much further apart."""
    lanes, num_shards = 4, max(8, 16_384 // rows)
    counts = dict.fromkeys(range(num_shards), rows)
    order = Order(counts, 0, mixing(counts, lanes), lanes)
    ours = [apart([(s, row) for _, s, row in order.samples(lane, 0, order.rows // lanes)]) for lane in range(lanes)]
    theirs = apart(list(by_webdataset(dict.fromkeys(range(num_shards // lanes), rows), 0)))
    assert np.mean(ours) >= theirs
    assert mixing(counts, lanes) * rows >= MIXED
