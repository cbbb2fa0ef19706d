"""Metrics of image quality as functions of feature arrays.

Features are [N, D], one row per image, of any network. Everything is float64 except distances between many rows, which
are computed block by block on the devices in float32. No function stores a copy of all features in another precision,
or all pairs of rows. Where it matters, the arguments' names distinguish real from generated images.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 2048  # rows at a time
_FITTED = 5  # different numbers of images to which an extrapolation is fitted


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of features, which can be accumulated over batches, shards and processes.

    Attributes:
      count: number of rows.
      mean: float64 [D].
      scatter: float64 [D, D], the sum of outer products of the rows' deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        return cls.over([features])

    @classmethod
    def over(cls, batches: Iterable[np.ndarray]) -> "Moments":
        """The moments of all rows in the batches, [N, D] each, which are read once."""
        total = Accumulator()
        for batch in batches:
            total.add(batch)
        return total.moments()

    @classmethod
    def from_covariance(cls, mean: np.ndarray, covariance: np.ndarray, count: int) -> "Moments":
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        return cls(count, mean, covariance * (count - 1))

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, with divisor count - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.count}")
        return self.scatter / (self.count - 1)


class Accumulator:
    """Accumulates rows to `Moments`, storing at most a block of rows and a few [D, D] arrays."""

    def __init__(self) -> None:
        self._waiting: list[np.ndarray] = []
        self._count = 0
        # Sums about the first block's mean suffer no cancellation, however far from 0 the features are.
        self._shift = self._sum = self._products = np.zeros(0)

    def add(self, rows: np.ndarray) -> None:
        """Adds rows [N, D]; N may be 0."""
        rows = np.asarray(rows)
        for part in _blocks(len(rows)):
            self._waiting.append(rows[part])
            if sum(map(len, self._waiting)) >= _BLOCK:
                self._flush()

    def _flush(self) -> None:
        block = np.concatenate(self._waiting).astype(np.float64)
        self._waiting = []
        if not self._count:
            self._shift = block.mean(0)
            self._sum, self._products = np.zeros_like(self._shift), np.zeros((block.shape[1],) * 2)
        block -= self._shift
        self._count += len(block)
        self._sum += block.sum(0)
        self._products += block.T @ block

    def moments(self) -> Moments:
        """The moments of the rows so far; more may be added."""
        if self._waiting:
            self._flush()
        mean = self._sum / max(self._count, 1)
        return Moments(self._count, self._shift + mean, self._products - np.outer(mean, self._sum))


def covariance_root(moments: Moments) -> np.ndarray:
    """R, float64 [D, rank], such that R R^T is the covariance."""
    values, vectors = np.linalg.eigh(moments.covariance)
    kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(first: Moments, second: Moments, *, root: np.ndarray | None = None) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), of the Gaussians with these moments (Heusel et al. 2017, eq. 6).

    The trace of the root is computed from the eigenvalues of R2^T C1 R2 with R2 R2^T = C2, which are real and not
    negative, so singular covariances, from fewer images than features, need no special case.

    Args:
      first, second: moments of the same features.
      root: `covariance_root(second)`, to reuse it when comparing many with one.
    """
    root = covariance_root(second) if root is None else root
    product = root.T @ first.covariance @ root
    trace_of_root = np.sum(np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0.0)))
    distance = np.sum((first.mean - second.mean) ** 2)
    distance += np.trace(first.covariance) + np.trace(second.covariance) - 2 * trace_of_root
    return float(max(distance, 0.0))


def frechet_influence(
    features: np.ndarray, moments: Moments, reference: Moments, *, root: np.ndarray | None = None
) -> np.ndarray:
    """The influence of each row on the Frechet distance, [N]: the derivative of the distance to a reference at the
    rows' moments, in the direction of the row; its mean is 0.

    With d = x - m1 it is 2 (m1 - m2).d + d^T (1 - T) d minus its mean, T = R2 (R2^T C1 R2)^(-1/2) R2^T, because the
    derivative of Tr (C1 C2)^(1/2) with respect to C1 is T / 2. To first order, the distance for another draw of images
    differs from this one by the mean of resampled influences (the infinitesimal jackknife, Efron 1982). A plain
    bootstrap is more expensive and worse: repeated rows raise the distance by about its bias once more.

    Args:
      features: [N, D].
      moments: `Moments.of(features)`.
      reference, root: as `second` and `root` in `frechet_distance`.
    """
    root = covariance_root(reference) if root is None else root
    values, vectors = np.linalg.eigh(root.T @ moments.covariance @ root)
    kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    # |d^T transport|^2 is d^T T d.
    transport = root @ (vectors[:, kept] * values[kept] ** -0.25)
    influence = np.empty(len(features))
    for rows in _blocks(len(features)):
        d = features[rows] - moments.mean
        influence[rows] = 2 * d @ (moments.mean - reference.mean) + np.sum(d**2, 1) - np.sum((d @ transport) ** 2, 1)
    return influence - influence.mean()


def bootstrap_interval(
    value: float, influence: np.ndarray, *, level: float = 0.95, resamplings: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """A bootstrap interval of a statistic of N rows.

    It resamples the statistic's linear approximation, which follows from its value and the rows' influences [N].
    """
    rng, count = np.random.default_rng(seed), len(influence)
    means = [influence[rng.integers(0, count, count)].mean() for _ in range(resamplings)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(max(value + low, 0.0)), float(max(value + high, 0.0))


class Extrapolation(NamedTuple):
    """The Frechet distance for infinitely many generated images, and the bias of the distance for N images."""

    infinity: float
    bias: float


def frechet_infinity(
    features: np.ndarray, reference: Moments, *, root: np.ndarray | None = None, seed: int = 0
) -> Extrapolation:
    """The Frechet distance extrapolated to infinitely many generated images (FID-infinity, Chong & Forsyth 2020).

    A line in 1 / N is fitted to the distances for N, N / 2, ... N / 5 images, each the mean over disjoint random parts.
    The bias due to the reference's number of images remains. The law holds once N is several times D.

    Args:
      features: [N, D], N at least 10.
      reference, root: as `second` in `frechet_distance`.
      seed: of the parts.
    """
    root = covariance_root(reference) if root is None else root
    count = len(features)
    if count < 2 * _FITTED:
        raise ValueError(f"an extrapolation needs at least {2 * _FITTED} rows, not {count}")
    order = np.random.default_rng(seed).permutation(count)
    distances = [
        np.mean([_distance_of_part(features, part, reference, root) for part in np.array_split(order, parts)])
        for parts in range(1, _FITTED + 1)
    ]
    slope, infinity = np.polyfit(np.arange(1, _FITTED + 1) / count, distances, 1)
    return Extrapolation(float(infinity), float(slope / count))


def _distance_of_part(features: np.ndarray, part: np.ndarray, reference: Moments, root: np.ndarray) -> float:
    moments = Moments.over(features[part[rows]] for rows in _blocks(len(part)))
    return frechet_distance(moments, reference, root=root)


def split_distance(features: np.ndarray, count: int, *, seed: int = 0) -> float:
    """The Frechet distance between `count` random rows, from 2 to N - 2, and the others."""
    if not 2 <= count <= len(features) - 2:
        raise ValueError(f"count is {count}; accepted: 2 to {len(features) - 2}, two less than the number of rows")
    parts = np.split(np.random.default_rng(seed).permutation(len(features)), [count])
    return frechet_distance(*(Moments.over(features[part[rows]] for rows in _blocks(len(part))) for part in parts))


def scaled_floor(distance: float, parts: tuple[int, int], count: int, num_real: int) -> float:
    """The Frechet distance that `count` generated images would have to `num_real` real ones if they were real too.

    It is scaled from a distance between parts of the real images: between n and m images of the same distribution, the
    distance is about proportional to 1 / n + 1 / m.
    """
    return distance * (1 / count + 1 / num_real) / (1 / parts[0] + 1 / parts[1])


def frechet_floor(real: np.ndarray, count: int, *, seed: int = 0) -> float:
    """`scaled_floor` from splitting the real images: `count` of them, at most half, against the others.

    Args:
      real: [N, D], N at least 4.
      count: number of generated images.
      seed: of the split.
    """
    taken = max(min(count, len(real) // 2), 2)
    distance = split_distance(real, taken, seed=seed)
    return scaled_floor(distance, (taken, len(real) - taken), count, len(real))


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp(E[KL(p(y|x) || p(y))]), mean and standard deviation over splits of consecutive images (Salimans et al. 2016).

    Raises:
      ValueError: fewer images than splits.
    """
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(f"splits is {splits}; accepted: 1 to {count}, the number of images")
    scores = []
    for i in range(splits):
        part = np.asarray(logits[i * count // splits : (i + 1) * count // splits], np.float64)
        part = part - part.max(1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(1, keepdims=True))
        p = np.exp(log_p)
        marginal = np.log(np.maximum(p.mean(0), 1e-300))
        scores.append(np.exp(np.mean(np.sum(p * (log_p - marginal), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def _polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3 (Binkowski et al.
    2018, eq. 4); it may be below 0."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def off_diagonal_mean(a: np.ndarray) -> float:
        kernel = _polynomial_kernel(a, a)
        return (kernel.sum() - np.trace(kernel)) / (len(a) * (len(a) - 1))

    return float(off_diagonal_mean(x) + off_diagonal_mean(y) - 2 * _polynomial_kernel(x, y).mean())


def kid(
    real: np.ndarray, fake: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance: mean and standard deviation of `squared_mmd` over random subsets.

    Raises:
      ValueError: a subset larger than either set.
    """
    most = min(len(real), len(fake))
    if not 2 <= subset_size <= most:
        raise ValueError(f"subset_size is {subset_size}; accepted: 2 to {most}, the smaller set")
    rng = np.random.default_rng(seed)
    choose = lambda features: features[rng.choice(len(features), subset_size, replace=False)]  # noqa: E731
    values = [squared_mmd(choose(real), choose(fake)) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


# Manifolds: unions of balls around each image that reach its k-th nearest neighbour.


@jax.jit
def _squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(x**2, 1)[:, None] - 2 * product + jnp.sum(y**2, 1), 0.0)


def _blocks(rows: int) -> Iterator[slice]:
    for first in range(0, rows, _BLOCK):
        yield slice(first, min(first + _BLOCK, rows))


@partial(jax.jit, static_argnums=1)
def _smallest(values: jax.Array, k: int) -> jax.Array:
    return -jax.lax.top_k(-values, k)[0]


def _centre(*sets: np.ndarray) -> np.ndarray:
    """A centre to subtract so that differences of rows lose little precision in float32."""
    means = [
        np.mean([features[rows].mean(0, dtype=np.float64) for rows in _blocks(len(features))], 0) for features in sets
    ]
    return np.mean(means, axis=0)


def _about(centre: np.ndarray, features: np.ndarray, rows: slice) -> jax.Array:
    return jnp.asarray(features[rows] - centre, jnp.float32)


def _squared_radii(features: np.ndarray, centre: np.ndarray, *ks: int) -> np.ndarray:
    """[len(ks), N], the squared distance of each row to its k-th nearest other row."""
    for k in ks:
        if not 1 <= k < len(features):
            raise ValueError(f"k is {k}; accepted: 1 to {len(features) - 1}, one less than the number of images")
    nearest = np.full((len(features), max(ks)), np.inf, np.float32)

    def merge(rows: slice, distances: jax.Array) -> None:
        nearest[rows] = _smallest(jnp.concatenate([nearest[rows], distances], axis=1), max(ks))

    for rows in _blocks(len(features)):
        x = _about(centre, features, rows)
        own = _squared_distances(x, x)
        merge(rows, jnp.where(jnp.eye(len(own), dtype=bool), jnp.inf, own))
        for columns in _blocks(len(features)):
            if columns.start > rows.start:  # the other half of the pairs, by symmetry
                distances = _squared_distances(x, _about(centre, features, columns))
                merge(rows, distances)
                merge(columns, distances.T)
    return nearest.T[[k - 1 for k in ks]]


class Manifolds(NamedTuple):
    """How well two sets of images cover each other."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifolds(real: np.ndarray, fake: np.ndarray, *, k: int = 3, density_k: int = 5) -> Manifolds:
    """Improved precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020, eqs. 3, 4).

    Precision is the share of generated images within the real manifold, and recall the reverse. Density is the mean
    number of real balls that contain a generated image, divided by k; coverage is the share of real balls that contain
    a generated image.

    Args:
      real, fake: [N, D], each with any N.
      k: for precision and recall.
      density_k: for density and coverage.

    Raises:
      ValueError: a k that is not below both numbers of images.
    """
    centre = _centre(real, fake)
    ball, density_ball = _squared_radii(real, centre, k, density_k)
    (fake_ball,) = _squared_radii(fake, centre, k)
    inside, balls = np.zeros(len(fake), bool), np.zeros(len(fake), np.int64)
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows in _blocks(len(fake)):
        x = _about(centre, fake, rows)
        for columns in _blocks(len(real)):
            distances = np.asarray(_squared_distances(x, _about(centre, real, columns)))
            inside[rows] |= np.any(distances <= ball[columns], axis=1)
            recalled[columns] |= np.any(distances <= fake_ball[rows, None], axis=0)
            hit = distances <= density_ball[columns]
            balls[rows] += hit.sum(1)
            covered[columns] |= hit.any(0)
    return Manifolds(*(float(x) for x in (inside.mean(), recalled.mean(), balls.mean() / density_k, covered.mean())))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Precision and recall alone; see `manifolds`."""
    found = manifolds(real, fake, k=k, density_k=k)
    return found.precision, found.recall


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage alone; see `manifolds`."""
    found = manifolds(real, fake, k=k, density_k=k)
    return found.density, found.coverage
