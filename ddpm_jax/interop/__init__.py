"""Weights from and to other projects' formats: diffusers folders, and plain safetensors of our own tree."""
