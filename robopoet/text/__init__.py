"""Text in, windows of token ids out."""
