"""What a run needs besides its loop: optimizers, evaluation, its folder, its log."""
