"""Folders of diffusers, read and written without diffusers or PyTorch: one module a component, and `folder` for all."""
