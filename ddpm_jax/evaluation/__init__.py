"""Evaluating samples and models: features, metrics, references, likelihood."""
