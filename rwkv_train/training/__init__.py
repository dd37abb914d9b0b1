"""Training: `run.train(config)` goes from a checked config to a trained model."""
