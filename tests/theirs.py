"""Shared by the comparisons with PyTorch and diffusers; neither is imported before it is used."""

import numpy as np


def their_network(config, kind="UNet2DModel"):
    """A diffusers network with all parameters random, including those that start at zero or one."""
    import diffusers
    import torch

    torch.manual_seed(0)
    net = getattr(diffusers, kind)(**config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def to_torch(x):
    """[B, C, H, W] of [B, H, W, C]."""
    import torch

    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def to_numpy(x):
    """[B, H, W, C] of [B, C, H, W]."""
    return x.detach().numpy().transpose(0, 2, 3, 1)


def relative(found, expected):
    """The norm of the difference relative to that of the expected value."""
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)
