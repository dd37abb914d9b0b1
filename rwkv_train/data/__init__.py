"""From files to batches: corpus → tokenizer → store → order → Batches → DataModule.

Only batches.py and its users (ahead.py, batch_preview.py, datamodule.py) import torch, so that errors in the data
settings are reported before torch is loaded.
"""
