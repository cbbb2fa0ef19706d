"""Reads and writes diffusers folders without diffusers or PyTorch: one module per component, and `folder` for all."""
