"""Tests mirror rwkv_train/."""

# What the one fork server of a test session imports, so that no process forked from it needs to.
PRELOAD = ["rwkv_train.data.prepare.shards", "torch.distributed", "lightning", "tests.runs", "tests.preload"]

# The files that take longest, these first: xdist hands out files in the order of collection, and one of a minute that
# begins last keeps the other processes waiting.
LONGEST = (
    "exact/test_untrained.py",
    "exact/test_strategies.py",
    "cli/test_mistakes.py",
    "training/test_strategy.py",
    "evaluation/test_lm_eval_adapter.py",
    "exact/test_kill.py",
    "ops/test_build.py",
    "checkpoint/test_checkpoint.py",
    "golden/test_golden.py",
    "config/test_config.py",
    "exact/test_variants.py",
    "exact/test_matrix.py",
    "ops/test_selftest.py",
)
