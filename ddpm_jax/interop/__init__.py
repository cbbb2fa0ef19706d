"""Weights from and to other projects: folders of diffusers and transformers, and plain safetensors of our own tree."""
