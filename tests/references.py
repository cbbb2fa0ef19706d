"""Formulas that tests of several modules hold the project to, in float64."""

import numpy as np


def coefficients(betas, timesteps):
    """For a descending sub-sequence of timesteps, in float64: a, s, x_0's factor, x's factor, posterior variance, beta.

    The sub-sequence is a diffusion of its own, with the betas that give it the same abar (Improved DDPM, section 4).
    """
    abar = np.cumprod(1 - np.asarray(betas, np.float64))[np.asarray(timesteps)]
    previous = np.append(abar[1:], 1.0)
    beta = 1 - abar / previous
    return (
        np.sqrt(abar),
        np.sqrt(1 - abar),
        beta * np.sqrt(previous) / (1 - abar),
        (1 - previous) * np.sqrt(1 - beta) / (1 - abar),
        beta * (1 - previous) / (1 - abar),
        beta,
    )
