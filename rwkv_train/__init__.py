"""rwkv_train: a training framework for RWKV language models."""

__version__ = "0.1.0"
