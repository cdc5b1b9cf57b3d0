"""Training: the loop, its files, batches and optimizers, and the supervised stages."""
