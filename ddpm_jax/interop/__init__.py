"""Weights from and for other projects: diffusers and transformers folders, and safetensors with our own names."""
