"""The diffusion core: pure functions of arrays. See `schedules`, `gaussian`, `bound`, `losses` and `samplers`."""
