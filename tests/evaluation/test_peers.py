"""The FID network and the metrics against torch-fidelity's own, with the same random weights and the same features."""

import importlib.util

import fidelity
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.features import load_inception
from ddpm_jax.evaluation.metrics import Moments

torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install -e '.[peers]')")
pytestmark = [pytest.mark.peers, pytest.mark.slow]


def torch_fidelity(module):
    """One of its modules."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed (pip install --no-deps torch-fidelity)")
    return fidelity.module(module)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Theirs with random weights, and ours with what its file holds."""
    torch_fidelity("feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    return fidelity.inception(path), load_inception(path)


@pytest.mark.parametrize("size", [32, 400])
def test_inception(measure, networks, size):
    theirs, ours = networks
    images = np.random.default_rng(size).integers(0, 256, (16, size, size, 3), np.uint8)
    found = ours.of([images], Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,)), 16)
    spatial = []
    hook = theirs.Mixed_6d.branch1x1.conv.register_forward_hook(lambda module, _, output: spatial.append(output))
    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2)))
    hook.remove()
    for name, values in zip(("pool", "logits"), expected, strict=True):
        error = relative_error(found[name], values.numpy())
        what = f"Inception's {name}, relative to their spread, 16 images of 32 and 400 pixels"
        measure(what, "torch-fidelity", error, 1e-4, "relative")
    first = spatial[0][:, :7].numpy().transpose(0, 2, 3, 1).reshape(16, -1)
    assert relative_error(found["spatial"], first) < 1e-4


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean(0))


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((48, 48)) / 7
    sizes = ((900, 0.1), (700, 0.2))
    return [np.maximum(rng.standard_normal((n, 48)) @ mix + shift, 0).astype(np.float32) for n, shift in sizes]


def test_frechet_distance(measure, features):
    fid = torch_fidelity("metric_fid")
    statistics = [fid.fid_features_to_statistics(torch.tensor(f)) for f in features]
    expected = fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    found = metrics.frechet_distance(*map(Moments.of, features))
    measure("Frechet distance of given features", "torch-fidelity", abs(found / expected - 1), 1e-6, "relative")


def test_inception_score(measure, features):
    isc = torch_fidelity("metric_isc")
    expected = isc.isc_features_to_metric(torch.tensor(5 * features[0]), splits=7, shuffle=False)
    found = metrics.inception_score(5 * features[0], splits=7)
    for value, theirs in zip(found, expected.values(), strict=True):
        measure("Inception score of given logits", "torch-fidelity", abs(value / theirs - 1), 1e-6, "relative")


def test_squared_mmd(measure, features):
    kid = torch_fidelity("metric_kid")
    options = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    subsets = [f[:500].astype(np.float64) for f in features]
    expected = kid.kernel_mmd(*subsets, kid_kernel_poly_coef0=1.0, **options)
    found = metrics.squared_mmd(*subsets)
    measure("KID of given features", "torch-fidelity", abs(found / expected - 1), 1e-6, "relative")


def test_precision_recall(measure, features):
    prc = torch_fidelity("metric_prc")
    expected = prc.prc_features_to_metric(
        *map(torch.tensor, reversed(features)),
        prc_neighborhood=3,
        prc_batch_size=1000,
        save_cpu_ram=False,
        verbose=False,
    )
    found = metrics.precision_recall(*features)
    for value, name in zip(found, ("precision", "recall"), strict=True):
        measure("precision and recall of given features", "torch-fidelity", abs(value - expected[name]), 1e-6)
