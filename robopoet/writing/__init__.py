"""A trained model generates: tokens, passages, sessions."""
