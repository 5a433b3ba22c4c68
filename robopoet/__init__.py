"""What stands behind the scripts: text, weights, training and writing, each in a room of its own."""
