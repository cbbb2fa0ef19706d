"""The metrics for sets and Gaussians with known values, and against SciPy and brute force."""

import numpy as np
import pytest
import scipy.linalg

from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.metrics import Accumulator, Moments

RNG = np.random.default_rng(0)


def random_covariance(seed, size, rank=None):
    root = np.random.default_rng(seed).standard_normal((size, rank or size))
    return root @ root.T / size


class TestMoments:
    def test_are_numpy_s(self):
        features = RNG.standard_normal((50, 7)) * 3 + 100
        moments = Moments.of(features)
        np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-13)
        np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), rtol=1e-10)

    @pytest.mark.parametrize("offset", [0, 1e4])
    def test_streaming_is_the_batch_computation(self, offset):
        """To 1e-8 relative, rows sorted and in portions of any size, far from 0 too."""
        features = np.sort(np.random.default_rng(1).standard_normal((6000, 12)).astype(np.float32), axis=0) + offset
        expected = np.cov(features.astype(np.float64), rowvar=False)
        for cuts in ([], [1, 5, 2100], list(range(64, 6000, 64))):
            moments = Moments.over(np.split(features, cuts))
            assert moments.count == 6000
            np.testing.assert_allclose(moments.mean, features.mean(0, dtype=np.float64), rtol=1e-8, atol=1e-12)
            np.testing.assert_allclose(moments.covariance, expected, rtol=1e-8)

    def test_more_may_follow(self):
        total, features = Accumulator(), RNG.standard_normal((9, 3))
        assert total.moments().count == 0
        for count in (4, 9):
            total.add(features[total.moments().count : count])
            np.testing.assert_allclose(total.moments().scatter, Moments.of(features[:count]).scatter, rtol=1e-12)

    def test_of_one_row(self):
        with pytest.raises(ValueError, match="at least 2 rows, not 1"):
            _ = Moments.of(np.ones((1, 3))).covariance


class TestFrechetDistance:
    @pytest.mark.parametrize("size", [1, 5, 40])
    def test_of_gaussians_that_commute(self, size):
        """Diagonal covariances: |m1 - m2|^2 + sum of (sqrt(v1) - sqrt(v2))^2."""
        m1, m2 = RNG.standard_normal((2, size))
        v1, v2 = RNG.uniform(0.1, 3, (2, size))
        rotation = np.linalg.qr(RNG.standard_normal((size, size)))[0]
        gaussians = (Moments.from_covariance(m, rotation * v @ rotation.T, 1000) for m, v in ((m1, v1), (m2, v2)))
        expected = np.sum((m1 - m2) ** 2) + np.sum((np.sqrt(v1) - np.sqrt(v2)) ** 2)
        assert metrics.frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-10)

    def test_is_scipy_s_square_root(self):
        c1, c2 = random_covariance(1, 30), random_covariance(2, 30)
        m1, m2 = RNG.standard_normal((2, 30))
        root = scipy.linalg.sqrtm(c1 @ c2).real
        expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * root)
        found = metrics.frechet_distance(Moments.from_covariance(m1, c1, 9), Moments.from_covariance(m2, c2, 9))
        assert found == pytest.approx(expected, rel=1e-6)

    def test_of_singular_covariances(self):
        """The covariances have rank 3 in 20 dimensions, in the same and in orthogonal sub-spaces."""
        zero = np.zeros(20)
        a = np.diag([4.0, 1.0, 9.0] + [0.0] * 17)
        b = np.diag([0.0] * 17 + [4.0, 1.0, 9.0])
        moments = [Moments.from_covariance(zero, c, 100) for c in (a, b, 4 * a)]
        assert metrics.frechet_distance(moments[0], moments[0]) == pytest.approx(0, abs=1e-10)
        assert metrics.frechet_distance(moments[0], moments[1]) == pytest.approx(28, rel=1e-12)
        assert metrics.frechet_distance(moments[0], moments[2]) == pytest.approx(14, rel=1e-12)

    def test_falls_with_the_number_of_samples(self):
        """For samples of the same distribution it is the estimate's bias, about in proportion to 1 / n."""
        real = Moments.of(RNG.standard_normal((100_000, 16)))
        biases = [metrics.frechet_distance(Moments.of(RNG.standard_normal((n, 16))), real) for n in (200, 2000)]
        assert 5 < biases[0] / biases[1] < 20


def skewed(rng, count, dims, shift=0.0):
    """Rows like a network's features: correlated, not negative, of falling spread."""
    mix = np.random.default_rng(7).standard_normal((dims, dims)) / np.sqrt(dims) * np.linspace(1.5, 0.1, dims)
    return np.maximum(rng.standard_normal((count, dims)) @ mix + shift, 0)


class TestFrechetInfluence:
    def test_is_the_derivative_by_a_row_s_weight(self):
        """By finite differences of the distance with one row's weight raised; singular covariances too."""
        rng = np.random.default_rng(0)
        for count, dims in ((40, 5), (12, 20)):
            rows, reference = skewed(rng, count, dims, 0.3), Moments.of(skewed(rng, 300, dims))
            found = metrics.frechet_influence(rows, Moments.of(rows), reference)
            assert found.mean() == pytest.approx(0, abs=1e-9)

            def distance(weights, rows=rows, reference=reference):
                weights = weights / weights.sum()
                mean = weights @ rows
                # The covariance of `Moments` is that of equal weights times N / (N - 1).
                covariance = (rows - mean).T @ ((rows - mean) * weights[:, None]) * len(rows) / (len(rows) - 1)
                return metrics.frechet_distance(Moments.from_covariance(mean, covariance, 9), reference)

            step = 1e-4
            for row in (0, 7):
                change = step * np.eye(count)[row]
                slope = (distance(np.ones(count) + change) - distance(np.ones(count) - change)) / (2 * step)
                assert found[row] / count == pytest.approx(slope, rel=0.03 if dims < count else 0.2, abs=2e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize(("shift", "lowest", "highest"), [(0.3, 0.75, 1.3), (0.0, 0.9, 2.0)])
    def test_standard_error(self, shift, lowest, highest):
        """Against the spread over newly drawn sets, and against the true bootstrap; of the same distribution, where the
        first order vanishes, it is too wide rather than too narrow."""
        rng, dims, count = np.random.default_rng(1), 24, 400
        reference = Moments.of(skewed(rng, 20_000, dims))
        root = metrics.covariance_root(reference)
        distances, errors = [], []
        for _ in range(150):
            rows = skewed(rng, count, dims, shift)
            moments = Moments.of(rows)
            distances.append(metrics.frechet_distance(moments, reference, root=root))
            errors.append(np.std(metrics.frechet_influence(rows, moments, reference, root=root)) / np.sqrt(count))
        assert lowest < np.mean(errors) / np.std(distances) < highest
        again = [
            metrics.frechet_distance(Moments.of(rows[rng.integers(0, count, count)]), reference, root=root)
            for _ in range(150)
        ]
        assert 0.6 < errors[-1] / np.std(again) < 1.3
        # The plain bootstrap is unsuitable because its distances contain the bias twice.
        assert np.mean(again) - distances[-1] > np.std(again)

    def test_interval(self):
        influence = np.random.default_rng(0).standard_normal(10_000)
        influence = (influence - influence.mean()) / influence.std()
        low, high = metrics.bootstrap_interval(1.0, influence)
        assert (low, high) == pytest.approx((1 - 0.0196, 1 + 0.0196), abs=0.002)
        assert metrics.bootstrap_interval(1.0, influence) == (low, high)
        assert metrics.bootstrap_interval(0.001, influence)[0] == 0

    def test_of_images_that_are_all_the_same(self):
        same = Moments.of(np.ones((20, 3)))
        assert metrics.frechet_distance(same, same) == 0
        np.testing.assert_array_equal(metrics.frechet_influence(np.ones((20, 3)), same, same), 0)


class TestFrechetInfinity:
    def test_of_the_same_distribution_is_nearly_0(self):
        """Averaged over some draws, the bias is nearly all of the distance."""
        rng = np.random.default_rng(2)
        reference = Moments.of(skewed(rng, 100_000, 16))
        wholes, infinities, biases = [], [], []
        for _ in range(10):
            rows = skewed(rng, 1000, 16)
            wholes.append(metrics.frechet_distance(Moments.of(rows), reference))
            infinity, bias = metrics.frechet_infinity(rows, reference)
            infinities.append(infinity)
            biases.append(bias)
        assert abs(np.mean(infinities)) < 0.3 * np.mean(wholes)
        assert np.mean(biases) == pytest.approx(np.mean(wholes), rel=0.3)
        with pytest.raises(ValueError, match="needs at least 10 rows, not 9"):
            metrics.frechet_infinity(rows[:9], reference)

    def test_is_the_distance_of_many(self):
        rng = np.random.default_rng(3)
        reference = Moments.of(skewed(rng, 100_000, 16))
        many = metrics.frechet_distance(Moments.of(skewed(rng, 100_000, 16, 0.1)), reference)
        rows = skewed(rng, 1500, 16, 0.1)
        few = metrics.frechet_distance(Moments.of(rows), reference)
        assert abs(metrics.frechet_infinity(rows, reference).infinity - many) < 0.6 * (few - many)


class TestFloor:
    @pytest.mark.parametrize("count", [300, 1500, 6000])
    def test_is_the_distance_of_real_images(self, count):
        """For fewer than half as many images as in the reference, for more, and for more than all."""
        rng = np.random.default_rng(4)
        real = skewed(rng, 2000, 16)
        reference = Moments.of(real)
        drawn = [metrics.frechet_distance(Moments.of(skewed(rng, count, 16)), reference) for _ in range(20)]
        assert metrics.frechet_floor(real, count) == pytest.approx(np.mean(drawn), rel=0.35)

    def test_refuses_too_few(self):
        with pytest.raises(ValueError, match="accepted: 2 to 1, two less"):
            metrics.frechet_floor(np.zeros((3, 2)), 10)


class TestInceptionScore:
    def test_of_certain_and_uncertain_predictions(self):
        certain = 50.0 * np.eye(10)[np.arange(1000) % 10]
        assert metrics.inception_score(certain) == pytest.approx((10, 0), abs=1e-9)
        assert metrics.inception_score(np.zeros((1000, 10))) == pytest.approx((1, 0), abs=1e-12)

    def test_by_its_definition(self):
        logits = RNG.standard_normal((60, 4)) * 2
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        scores = []
        for part in p.reshape(3, 20, 4):
            scores.append(np.exp(np.mean(np.sum(part * np.log(part / part.mean(0)), axis=1))))
        assert metrics.inception_score(logits, splits=3) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)

    def test_refuses_more_splits_than_images(self):
        with pytest.raises(ValueError, match="splits is 10; accepted: 1 to 4"):
            metrics.inception_score(np.zeros((4, 3)))


class TestKid:
    def test_is_the_definition(self):
        x, y = RNG.standard_normal((8, 3)), RNG.standard_normal((6, 3))
        k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
        xx = [k(x[i], x[j]) for i in range(8) for j in range(8) if i != j]
        yy = [k(y[i], y[j]) for i in range(6) for j in range(6) if i != j]
        xy = [k(a, b) for a in x for b in y]
        assert metrics.squared_mmd(x, y) == pytest.approx(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy), rel=1e-12)

    def test_is_unbiased(self):
        """For two samples of one distribution its mean is 0, within five standard errors."""
        rng = np.random.default_rng(1)
        values = [metrics.squared_mmd(*rng.standard_normal((2, 20, 4))) for _ in range(2000)]
        assert abs(np.mean(values)) < 5 * np.std(values) / np.sqrt(len(values))
        assert min(values) < 0

    def test_of_subsets(self):
        real, fake = RNG.standard_normal((300, 4)), RNG.standard_normal((300, 4)) + 0.5
        mean, spread = metrics.kid(real, fake, subsets=50, subset_size=100)
        assert abs(mean - metrics.squared_mmd(real, fake)) < 5 * spread / np.sqrt(50)
        assert metrics.kid(real, fake, subsets=5, subset_size=100) == metrics.kid(
            real, fake, subsets=5, subset_size=100
        )
        with pytest.raises(ValueError, match="subset_size is 1000; accepted: 2 to 300"):
            metrics.kid(real, fake)


def brute_force(real, fake, k):
    """Precision, recall, density and coverage from all distances."""
    distance = lambda a, b: np.sqrt(((a[:, None] - b) ** 2).sum(-1))  # noqa: E731
    real_radius = np.sort(distance(real, real), axis=1)[:, k]
    fake_radius = np.sort(distance(fake, fake), axis=1)[:, k]
    inside = distance(fake, real) <= real_radius
    precision, recall = inside.any(1).mean(), (distance(real, fake) <= fake_radius).any(1).mean()
    return precision, recall, inside.sum(1).mean() / k, inside.any(0).mean()


class TestManifolds:
    @pytest.mark.parametrize("block", [16, 2048])
    def test_by_brute_force(self, monkeypatch, block):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        real, fake = RNG.standard_normal((70, 5)), 0.8 * RNG.standard_normal((55, 5)) + 0.3
        precision, recall, density, coverage = brute_force(real, fake, 4)
        assert metrics.precision_recall(real, fake, k=4) == pytest.approx((precision, recall))
        assert metrics.density_coverage(real, fake, k=4) == pytest.approx((density, coverage))

    def test_on_constructed_sets(self):
        """Half of the generated images where no real ones are; a third of the real ones without generated ones."""
        cloud = lambda n, centre: RNG.standard_normal((n, 3)) * 0.1 + centre  # noqa: E731
        real = np.concatenate([cloud(200, 0), cloud(200, 50), cloud(200, 100)])
        fake = np.concatenate([cloud(200, 0), cloud(200, 50), cloud(400, 1000)])
        precision, recall = metrics.precision_recall(real, fake)
        assert 0.44 < precision <= 0.5
        assert 0.6 < recall <= 2 / 3
        _, coverage = metrics.density_coverage(real, fake)
        assert 0.55 < coverage <= 2 / 3

    def test_of_a_set_and_itself(self):
        real = RNG.standard_normal((100, 4)) + 1000.0
        assert metrics.precision_recall(real, real) == (1, 1)
        density, coverage = metrics.density_coverage(real, real, k=5)
        # Each lies in its own ball, and each ball holds its five nearest besides, the last on its rim.
        assert density == pytest.approx(6 / 5, rel=0.02)
        assert coverage == 1

    def test_refuses_too_few_images(self):
        with pytest.raises(ValueError, match="k is 3; accepted: 1 to 2"):
            metrics.precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
