"""The entry points: the `rwkv-train` command, and what `python train.py` does before a run begins."""
