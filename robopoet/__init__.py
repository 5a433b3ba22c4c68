"""The scripts' library: text, weights, training, writing."""
