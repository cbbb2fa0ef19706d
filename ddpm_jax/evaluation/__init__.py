"""How good samples are: features, metrics, references, likelihood."""
