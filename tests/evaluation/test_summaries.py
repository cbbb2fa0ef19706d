"""Summaries put together from batches, shards and processes are those of all images at once."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from runs import PATIENCE, free_port
from xla import xla_flags

from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.features import Features, custom_features
from ddpm_jax.evaluation.summaries import shard_features, shard_summary, summarize
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling import shards

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (90, 4, 4, 3), np.uint8)


def apply(images):
    x = images.reshape(len(images), -1) / 255.0
    return {"pool": x[:, :12], "spatial": x[:, 12:20], "logits": x[:, 20:25]}


JUDGE = custom_features("pixels", apply)
SINGLE = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))


def assert_same(found, expected):
    """To 1e-8 relative."""
    assert (found.count, found.moments.keys(), found.rows.keys()) == (
        expected.count,
        expected.moments.keys(),
        expected.rows.keys(),
    )
    for name, moments in expected.moments.items():
        np.testing.assert_allclose(found.moments[name].mean, moments.mean, rtol=1e-8)
        scale = np.sqrt(np.outer(*[np.diag(moments.covariance)] * 2))
        np.testing.assert_allclose(found.moments[name].covariance / scale, moments.covariance / scale, atol=1e-8)
    for name, rows in expected.rows.items():
        np.testing.assert_array_equal(found.rows[name], rows)


@pytest.fixture(scope="module")
def whole():
    return summarize(JUDGE, [IMAGES], SINGLE, batch_size=90, source={"source": "test"})


class TestSummarize:
    def test_matches_the_features(self, whole):
        found = jax.tree.map(np.asarray, apply(IMAGES))
        assert (whole.count, whole.features, whole.source) == (90, "pixels", {"source": "test"})
        np.testing.assert_allclose(whole.moments["spatial"].covariance, np.cov(found["spatial"].T), rtol=1e-5)
        assert whole.rows.keys() == {"pool", "logits"}

    @pytest.mark.parametrize("devices", [1, 8])
    def test_in_batches_on_devices(self, whole, devices):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
        told = []
        found = summarize(JUDGE, np.split(IMAGES, [1, 50]), mesh, batch_size=16, progress=told.append)
        assert_same(found, whole)
        assert told == [16, 32, 48, 64, 80, 90]

    def test_moments_alone_need_little_memory(self):
        """Less than four arrays of the covariance's size and some blocks of rows, however many rows there are."""
        dims, count = 512, 40_000
        rng = np.random.default_rng(0)

        def batches():
            for _ in range(count // 200):
                yield rng.standard_normal((200, dims), np.float32)

        tracemalloc.start()
        moments = metrics.Moments.over(batches())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert moments.count == count
        assert peak < 8 * dims * (4 * dims + 4 * metrics._BLOCK) < 4 * dims * count


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path):
        for first in range(0, 90, 30):
            labels = np.zeros(30, np.int32)
            shards.write(tmp_path, first, first + 29, IMAGES[first : first + 30], {"label": labels}, {"seed": 0})
        return tmp_path

    @pytest.fixture
    def judge(self):
        """Counts the images that it processes, in the attribute `seen` of its function."""
        seen = []

        def of(self, images, mesh, batch_size):
            images = list(images)
            seen.append(sum(map(len, images)))
            return Features.of(self, images, mesh, batch_size)

        judge = type("Counting", (Features,), {"of": of})("pixels", JUDGE.frechet, None, JUDGE.apply)
        return judge, seen

    def test_in_parts_and_merged(self, folder, judge, whole):
        judge, seen = judge
        for part in ((1, 2), (0, 2)):
            shard_features(folder, judge, SINGLE, batch_size=16, part=part)
        assert seen == [30, 30, 30]
        assert_same(shard_summary(folder, judge), whole)
        assert_same(shard_summary(folder, judge, count=40), summarize(JUDGE, [IMAGES[:40]], SINGLE, batch_size=16))
        assert not shard_summary(folder, judge, keep=False).rows
        with pytest.raises(UserError, match="has 90 images, fewer than 91"):
            shard_summary(folder, judge, count=91)

    def test_continues_where_it_stopped(self, folder, judge, whole):
        """Only a damaged file and that of a rewritten shard are computed again."""
        judge, seen = judge
        told = []
        shard_features(folder, judge, SINGLE, batch_size=16, progress=lambda *args: told.append(args))
        assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
        kept = sorted((folder / f"features_{judge.digest}").iterdir())
        kept[0].write_bytes(kept[0].read_bytes()[:100])
        shards.write(folder, 30, 59, IMAGES[30:60, ::-1], {"label": np.zeros(30, np.int32)}, {"seed": 1})
        seen.clear()
        with pytest.raises(UserError, match=r"has no features of pixels yet: not all parts are done"):
            shard_summary(folder, judge)
        shard_features(folder, judge, SINGLE, batch_size=16)
        shard_features(folder, judge, SINGLE, batch_size=16)
        assert seen == [30, 30]
        np.testing.assert_array_equal(shard_summary(folder, judge).rows["pool"][:30], whole.rows["pool"][:30])
        assert not (shard_summary(folder, judge).rows["pool"][30:60] == whole.rows["pool"][30:60]).all()

    def test_other_features_are_kept_apart(self, folder):
        other = custom_features("other", apply)
        shard_features(folder, JUDGE, SINGLE)
        with pytest.raises(UserError, match="no features of other yet"):
            shard_summary(folder, other)

    def test_refusals(self, tmp_path):
        with pytest.raises(UserError, match="holds no shards"):
            shard_features(tmp_path, JUDGE, SINGLE)
        with pytest.raises(UserError, match="--part is 2/2"):
            shard_features(tmp_path, JUDGE, SINGLE, part=(2, 2))
        shards.write(tmp_path, 0, 29, IMAGES[:30], {"label": np.zeros(30, np.int32)}, {})
        path = next(tmp_path.glob("*.npz"))
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(UserError, match=f"{path.name}' cannot be read"):
            shard_features(tmp_path, JUDGE, SINGLE)


TWO_PROCESSES = """
import json, sys
import jax, numpy as np
port, index = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from ddpm_jax.runtime import parallel
from ddpm_jax.evaluation.features import custom_features
from ddpm_jax.evaluation.references import open_summary
from ddpm_jax.evaluation.summaries import summarize

images = np.random.default_rng(0).integers(0, 256, (90, 4, 4, 3), np.uint8)
judge = custom_features("pixels", lambda x: x.reshape(len(x), -1)[:, :12] / 255.0)
together = summarize(judge, [images], parallel.make_mesh(), batch_size=16)
shared = open_summary(sys.argv[3], judge, parallel.make_mesh(), batch_size=16)
told = []
for found in (together, shared):
    moments = found.moments["pool"]
    kept = [moments.mean.tolist(), moments.covariance.tolist(), found.rows["pool"].tolist()]
    told.append([jax.device_count(), found.count, *kept])
with open(sys.argv[4], "w") as file:  # on standard output, Gloo's threads print into the middle of lines
    json.dump(told, file)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """With the same images on all devices, and sharing a folder's shards."""
    for first in range(0, 90, 30):
        shards.write(tmp_path, first, first + 29, IMAGES[first : first + 30], {"label": np.zeros(30)}, {})
    port = str(free_port())
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": xla_flags(2),
    }
    outputs = [tmp_path / f"output{index}" for index in range(2)]
    processes = []
    for index, output in enumerate(outputs):
        command = [sys.executable, "-c", TWO_PROCESSES, port, str(index), str(tmp_path), str(output)]
        processes.append(subprocess.Popen(command, env=environment))
    try:
        assert [process.wait(timeout=PATIENCE) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    rows = (IMAGES.reshape(90, -1)[:, :12] / np.float32(255)).astype(np.float64)
    found = [result for output in outputs for result in json.loads(output.read_text())]
    assert len(found) == 4
    for devices, count, mean, covariance, kept in found:
        assert (devices, count) == (4, 90)
        np.testing.assert_allclose(kept, rows, rtol=1e-6)
        np.testing.assert_allclose(mean, np.mean(kept, axis=0), rtol=1e-8)
        np.testing.assert_allclose(covariance, np.cov(kept, rowvar=False), rtol=1e-8, atol=1e-12)
