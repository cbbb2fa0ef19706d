"""What images are judged by, from their features: the metrics of the field as functions of arrays.

Features are [N, D], one row an image, of any network. Everything is float64 but distances between many rows, which are
computed block by block on the devices in float32. Real and generated images are told apart by the arguments' names
where it matters.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 2048


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of features, to be added up over batches, shards and processes.

    Attributes:
      count: how many rows.
      mean: float64 [D].
      scatter: float64 [D, D], the sum of outer products of the rows' distances from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    @classmethod
    def from_covariance(cls, mean: np.ndarray, covariance: np.ndarray, count: int) -> "Moments":
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        return cls(count, mean, covariance * (count - 1))

    def __add__(self, other: "Moments") -> "Moments":
        """Those of both sets together (Chan, Golub & LeVeque 1979)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = np.outer(difference, difference) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased, divided by count - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 rows or more, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), of the Gaussians with these moments (Heusel et al. 2017, eq. 6).

    The trace of the root comes from the eigenvalues of C1^(1/2) C2 C1^(1/2), which are real and not negative, so that
    singular covariances, of fewer images than features, need no special case.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    product = root.T @ second.covariance @ root
    trace_of_root = np.sum(np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0.0)))
    distance = np.sum((first.mean - second.mean) ** 2)
    distance += np.trace(first.covariance) + np.trace(second.covariance) - 2 * trace_of_root
    return float(max(distance, 0.0))


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp(E[KL(p(y|x) || p(y))]), mean and standard deviation over splits of consecutive images (Salimans et al. 2016).

    Raises:
      ValueError: fewer images than splits.
    """
    logits = np.asarray(logits, np.float64)
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits is {splits}; accepted: 1 to {len(logits)}, the number of images")
    logits = logits - logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        p = np.exp(part)
        marginal = np.log(np.maximum(p.mean(0), 1e-300))
        scores.append(np.exp(np.mean(np.sum(p * (part - marginal), axis=1))))
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


# Manifolds: balls around each image, as wide as to its k-th nearest neighbour.


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


def _prepare(*sets: np.ndarray) -> list[np.ndarray]:
    """float32 about a common centre, which costs the differences the least precision."""
    centre = np.mean(np.concatenate([features.mean(0, keepdims=True) for features in sets]), axis=0)
    return [np.asarray(features - centre, np.float32) for features in sets]


def _squared_radii(features: np.ndarray, k: int) -> np.ndarray:
    """[N], the squared distance of each row to its k-th nearest other row."""
    if not 1 <= k < len(features):
        raise ValueError(f"k is {k}; accepted: 1 to {len(features) - 1}, one less than the images")
    radii = []
    for rows in _blocks(len(features)):
        nearest = np.full((rows.stop - rows.start, 0), 0.0, np.float32)
        for columns in _blocks(len(features)):
            distances = _squared_distances(features[rows], features[columns])
            if rows == columns:
                distances = distances + jnp.where(jnp.eye(len(distances), dtype=bool), jnp.inf, 0.0)
            joined = jnp.concatenate([nearest, distances], axis=1)
            nearest = np.asarray(_smallest(joined, min(k, joined.shape[1])))
        radii.append(nearest[:, k - 1])
    return np.concatenate(radii)


def _balls(centres: np.ndarray, squared_radii: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each point, in how many balls it lies; for each ball, whether a point lies in it."""
    inside, occupied = np.zeros(len(points), np.int64), np.zeros(len(centres), bool)
    for rows in _blocks(len(points)):
        for columns in _blocks(len(centres)):
            hit = np.asarray(_squared_distances(points[rows], centres[columns])) <= squared_radii[columns]
            inside[rows] += hit.sum(1)
            occupied[columns] |= hit.any(0)
    return inside, occupied


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): the share of generated images within the real ones'
    manifold, and the other way round.

    Raises:
      ValueError: a k that is not below both numbers of images.
    """
    real, fake = _prepare(real, fake)
    precision = np.mean(_balls(real, _squared_radii(real, k), fake)[0] > 0)
    recall = np.mean(_balls(fake, _squared_radii(fake, k), real)[0] > 0)
    return float(precision), float(recall)


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, eqs. 3 and 4): how many real balls a generated image lies in, over k;
    and the share of real balls with a generated image in them.

    Raises:
      ValueError: a k that is not below the number of real images.
    """
    real, fake = _prepare(real, fake)
    inside, occupied = _balls(real, _squared_radii(real, k), fake)
    return float(inside.mean() / k), float(occupied.mean())
