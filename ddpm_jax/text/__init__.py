"""Text as the encoders take it: tokenizers, and captions and prompts as tokens."""
