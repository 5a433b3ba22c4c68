"""What a run needs beside its loop: optimizers, evaluation, its folder, its log."""
