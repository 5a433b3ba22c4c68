"""Serving a model over HTTP: the engine that steps all requests together, and OpenAI's completions in front of it."""
