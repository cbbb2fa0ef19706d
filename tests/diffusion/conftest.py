import pytest

from ddpm_jax.diffusion.schedules import extract


@pytest.fixture
def gaussian_model():
    """(schedule, m, v) -> the exact eps, E[eps | x_t], for x_0 ~ N(m, v)."""

    def gaussian_model(schedule, m, v):
        def model(x, t):
            a = extract(schedule.sqrt_alphas_cumprod, t, x.ndim)
            s = extract(schedule.sqrt_one_minus_alphas_cumprod, t, x.ndim)
            return s * (x - a * m) / (a**2 * v + s**2)

        return model

    return gaussian_model
