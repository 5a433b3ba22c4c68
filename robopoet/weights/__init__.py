"""Weights on disk: ours, nanoGPT's and Hugging Face's."""
