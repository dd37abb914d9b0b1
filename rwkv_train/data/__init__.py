"""From files to batches: corpus → tokenizer → store → order → Batches → DataModule.

Only batches.py and its users (ahead.py, batch_preview.py, datamodule.py) import torch, so that errors in the data
settings are reported before torch is loaded.
"""

from rwkv_train.data.corpus import Corpus, Document, read_corpus
from rwkv_train.data.order import ShuffledOrder, Split, split_batch
from rwkv_train.data.store import MemoryStore, Store
from rwkv_train.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "Document",
    "MemoryStore",
    "ShuffledOrder",
    "Split",
    "Store",
    "Tokenizer",
    "load_tokenizer",
    "read_corpus",
    "split_batch",
]
