"""How a checkpoint is written, verified, found and read. When that happens is callbacks/checkpointing.py's matter.

directory.py: names and wholeness; pieces.py: what is in the files; writer.py: the files and their way to the disk.
"""
