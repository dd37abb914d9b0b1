"""Perplexity, lm-eval tasks, baselines for a loss, and reports of runs."""

from rwkv_train.evaluation.baselines import baselines

__all__ = ["baselines"]
