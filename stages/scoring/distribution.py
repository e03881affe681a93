"""How far apart two sets of pictures are, from features of theirs, in numpy and fp64.

    FID   Frechet distance of two Gaussians (Heusel et al., arXiv 1706.08500): needs far more pictures than features
    KID   squared MMD of a cubic kernel, unbiased (Binkowski et al., arXiv 1801.01401): also for few pictures
    IS    exp of the mean KL of each picture's classes to all of them (Salimans et al., arXiv 1606.03498)

They are called so if the features are Inception's of 2015; of any other network they are other numbers.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """What FID knows of a set: how many, the sum of their features (D,) and of their outer products (D, D), fp64.

    Sums merge by addition, in any order and of any parts."""

    n: int
    total: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of features (N, D)."""
        exact = features.astype(np.float64)
        return cls(len(exact), exact.sum(axis=0), exact.T @ exact)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n + other.n, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> np.ndarray:
        """(D,)"""
        found: np.ndarray = self.total / self.n
        return found

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), of a sample: by n - 1."""
        assert self.n > 1, "one picture has no covariance"
        found: np.ndarray = (self.products - np.outer(self.total, self.mean)) / (self.n - 1)
        return found


@dataclass(frozen=True)
class Spread:
    """A mean, and the standard deviation over the subsets or splits that it is of."""

    mean: float
    std: float


@dataclass(frozen=True)
class Kid(Spread):
    """KID: the mean over subsets, and its 95 % interval as one of all the pictures."""

    low: float
    high: float


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), 0 for equal moments.

    The trace of the root is that of the symmetric (S1^1/2 S2 S1^1/2)^1/2, whose eigenvalues are real and, but for
    rounding, not negative, also where there are fewer pictures than features.
    """
    s1, s2 = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(min=0)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(s1) + np.trace(s2) - 2 * cross)


def kernel_distance(a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 2020) -> Kid:
    """KID of features (N, D) and (M, D): mean over random subsets of that size, at most half of either; may be below 0.

    The interval is the delete-d jackknife's (Shao and Wu, 1989), over the same subsets: what is of n pictures scatters
    sqrt(size / (n - size)) times as much as what is of `size` out of them, n those of the smaller set.
    """
    n = min(len(a), len(b))
    size = min(size, n // 2)
    assert size > 1, "so few pictures have no distance"
    generator = np.random.RandomState(seed)  # as torch-fidelity draws them
    found = [squared_mmd(*(_drawn(side, size, generator) for side in (a, b))) for _ in range(subsets)]
    mean, std = float(np.mean(found)), float(np.std(found))
    half = 1.96 * std * (size / (n - size)) ** 0.5
    return Kid(mean, std, mean - half, mean + half)


def _drawn(features: np.ndarray, size: int, generator: np.random.RandomState) -> np.ndarray:
    """So many rows, in fp64."""
    rows: np.ndarray = features[generator.choice(len(features), size, replace=False)].astype(np.float64)
    return rows


def squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD of the kernel (x.y / D + 1)^3."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        values: np.ndarray = (x @ y.T / x.shape[1] + 1) ** 3
        return values

    def within(x: np.ndarray) -> float:
        values = kernel(x, x)
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 2020) -> Spread:
    """IS of logits (N, classes), shuffled and split, into N parts at most: between 1 and the number of classes."""
    splits = min(splits, len(logits))
    order = np.random.RandomState(seed).permutation(len(logits))  # as torch-fidelity shuffles
    scaled = logits.astype(np.float64)[order]
    scaled -= scaled.max(axis=1, keepdims=True)
    logs = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    scores = []
    for part in np.array_split(logs, [place * len(logs) // splits for place in range(1, splits)]):
        shares = np.exp(part)
        mean = np.logaddexp.reduce(part, axis=0) - np.log(len(part))  # of the shares, in logs: none is ever 0
        scores.append(np.exp((shares * (part - mean)).sum(axis=1).mean()))
    return Spread(float(np.mean(scores)), float(np.std(scores)))
