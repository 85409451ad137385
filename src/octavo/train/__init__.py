"""Training with trl: configuration, data, proof of the gradients, progress, the run and its folder."""
