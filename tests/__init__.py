"""Tests mirror rwkv_train/."""

# What the one fork server of a test session imports, so that no process forked from it needs to.
PRELOAD = ["rwkv_train.data.prepare.shards", "torch.distributed", "lightning", "tests.runs", "tests.preload"]
