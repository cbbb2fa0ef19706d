"""The diffusion core: pure functions of arrays. See `schedules`, `gaussian`, `losses` and `samplers`."""
