"""How checkpoints are written, verified, found and read; when one is written: training/callbacks/checkpoint.py.

name.py: directory names; directory.py: which checkpoints are complete, and the newest one; retention.py: which ones are
deleted; meta.py: meta.json; shards.py: the tensors in the files; writer.py and commit.py: how the ranks write them;
storage.py: the file system.
"""
