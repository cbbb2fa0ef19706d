"""Tokenizers, and captions and prompts as the arrays that networks take."""
