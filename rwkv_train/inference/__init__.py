"""Inference: the model as an RNN, one token after the other, with a memory of constant size."""
