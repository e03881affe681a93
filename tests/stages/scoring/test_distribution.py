"""Distances of sets of pictures, against closed forms, against scipy, and against torch-fidelity."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from stages.scoring.distribution import Moments, frechet_distance, inception_score, kernel_distance, squared_mmd


def features(n: int, seed: int, width: int = 16, scale: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.tanh(generator.normal(size=(n, width)) @ generator.normal(size=(width, width)) * scale)


def gaussian(mean: float, variances: list[float], n: int = 100) -> Moments:
    """The moments of n samples that have exactly this mean and covariance."""
    width = len(variances)
    total = np.full(width, mean) * n
    return Moments(n, total, np.diag(variances) * (n - 1) + np.outer(total, total) / n)


def test_the_golden_of_two_gaussians() -> None:
    a, b = gaussian(0, [1, 2, 3, 4, 5]), gaussian(2, [5, 4, 3, 2, 1])
    assert frechet_distance(a, b) == pytest.approx(23.74201959101608, abs=1e-10)
    assert frechet_distance(a, gaussian(3, [1, 2, 3, 4, 5])) == pytest.approx(5 * 9, abs=1e-10)


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(axis=0) - b.mean(axis=0)
    return float(difference @ difference + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real))


def test_frechet_is_scipys() -> None:
    a, b = features(300, 0), features(400, 1)
    ours = frechet_distance(Moments.of(a), Moments.of(b))
    assert ours == pytest.approx(by_scipy(a, b), abs=1e-10)
    assert ours == pytest.approx(frechet_distance(Moments.of(b), Moments.of(a)), abs=1e-10)
    assert frechet_distance(Moments.of(a), Moments.of(a)) == pytest.approx(0, abs=1e-10)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(16, 16)))[0]
    assert frechet_distance(Moments.of(a @ rotation), Moments.of(b @ rotation)) == pytest.approx(ours, abs=1e-9)


def test_fewer_pictures_than_features_are_no_trouble() -> None:
    a, b = features(10, 0), features(300, 1)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(by_scipy(a, b), abs=1e-5)


@given(st.lists(st.integers(1, 299), max_size=4), st.randoms())
def test_moments_of_parts_add_up_in_any_order(cuts: list[int], random: object) -> None:
    whole = features(300, 0).astype(np.float32)
    parts = [Moments.of(part) for part in np.split(whole, sorted(set(cuts)))]
    random.shuffle(parts)  # type: ignore[attr-defined]
    merged, direct = sum(parts[1:], parts[0]), Moments.of(whole)
    assert merged.n == 300
    np.testing.assert_allclose(merged.covariance, direct.covariance, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(whole.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_kid_by_hand_and_around_nothing() -> None:
    a, b = features(30, 0), features(30, 0, scale=0.3)
    table = np.array([[(x @ y / 16 + 1) ** 3 for y in (*a, *b)] for x in (*a, *b)])
    pairs = 30 * 29
    inside = (table[:30, :30].sum() - np.trace(table[:30, :30])) + (table[30:, 30:].sum() - np.trace(table[30:, 30:]))
    assert squared_mmd(a, b) == pytest.approx(inside / pairs - 2 * table[:30, 30:].mean(), abs=1e-10)
    one = features(2000, 5, width=4)
    same = kernel_distance(one, one[::-1], subsets=50, size=100)
    assert same.low < 0 < same.high  # of one distribution: also below 0
    assert kernel_distance(features(500, 5), features(500, 6), size=100).low > same.high


def test_kids_interval_holds_the_true_distance_about_as_often_as_it_says() -> None:
    """Also of few pictures, where the subsets are half of all."""
    generator = np.random.default_rng(0)

    def drawn(mean: float, n: int) -> np.ndarray:
        return generator.normal(mean, 1, size=(n, 4))

    true = squared_mmd(drawn(0, 4000), drawn(0.5, 4000))
    for n in (40, 400):
        found = [kernel_distance(drawn(0, n), drawn(0.5, n), subsets=40, size=100) for _ in range(60)]
        held = sum(one.low <= true <= one.high for one in found)
        assert 50 <= held <= 60, held


def test_inception_score_of_certain_and_of_blind_classifiers() -> None:
    certain = np.eye(10)[np.arange(1000) % 10] * 1e3
    assert inception_score(certain, splits=1).mean == pytest.approx(10)
    assert inception_score(np.zeros((100, 10))).mean == pytest.approx(1)
    assert inception_score(np.full((100, 10), 1e4)).mean == pytest.approx(1)


def test_a_few_pictures_have_fewer_splits() -> None:
    assert inception_score(np.eye(4) * 1e3, splits=10).mean == pytest.approx(1)  # a picture a split


def test_all_three_are_those_of_torch_fidelity() -> None:
    a, b = features(300, 0), features(400, 1)
    theirs = [fid_features_to_statistics(torch.from_numpy(side)) for side in (a, b)]
    fid = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(fid, abs=1e-8)
    settings = {"kid_subsets": 5, "kid_subset_size": 100, "rng_seed": 2020, "verbose": False}
    kid = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), **settings)
    ours = kernel_distance(a, b, subsets=5, size=100)
    assert ours.mean == pytest.approx(kid["kernel_inception_distance_mean"], abs=1e-8)
    assert ours.std == pytest.approx(kid["kernel_inception_distance_std"], abs=1e-8)
    isc = isc_features_to_metric(torch.from_numpy(a))
    assert inception_score(a).mean == pytest.approx(isc["inception_score_mean"], abs=1e-8)
    assert inception_score(a).std == pytest.approx(isc["inception_score_std"], abs=1e-8)
