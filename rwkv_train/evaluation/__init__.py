"""What a model's loss is measured against, and by."""

from rwkv_train.evaluation.baselines import baselines

__all__ = ["baselines"]
