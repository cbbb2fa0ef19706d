"""torch-fidelity's modules, and its Inception with random weights, for comparisons in tests and benchmarks."""

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np


def module(name: str) -> Any:
    """One of its modules, imported without torchvision."""
    # Its data sets and further networks, which nothing here uses, want torchvision.
    names = ("", ".datasets", ".models", ".transforms", ".transforms.functional")
    with mock.patch.dict(sys.modules, {f"torchvision{name}": mock.MagicMock() for name in names}):
        return importlib.import_module(f"torch_fidelity.{name}")


def inception(path: Path, features: tuple[str, ...] = ("2048", "logits_unbiased")) -> Any:
    """Its network with random weights that keep activations about 1, which it also writes to `path`."""
    import torch

    extractor = module("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    torch.manual_seed(0)
    state = {}
    empty = extractor.__new__(extractor)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "load"))
        stack.enter_context(mock.patch.object(extractor, "load_state_dict"))
        empty.__init__("x", ["2048", "logits_unbiased", "768"], feature_extractor_weights_path="none")
    for name, value in empty.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = value
        elif value.ndim > 1:
            state[name] = torch.randn(value.shape) * (2.0 / np.prod(value.shape[1:])) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(value.shape) + 0.5
        else:
            state[name] = 0.1 * torch.randn(value.shape)
    torch.save(state, path)
    return extractor("x", list(features), feature_extractor_weights_path=path)
