"""Training: `run.train(config)` trains a model by a checked config."""
