"""The scripts' library: text, weights, training, writing."""

VERSION = "0.1.0"
