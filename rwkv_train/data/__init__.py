"""From files to batches: corpus → tokenizer → store → order → Batches → DataModule.

batches.py imports torch, datamodule.py Lightning, and nothing else here does: a mistake in a path is told quickly.
"""

from rwkv_train.data.corpus import Corpus, Document, read_corpus
from rwkv_train.data.order import Order, Split, split_batch
from rwkv_train.data.store import MemoryStore, Store
from rwkv_train.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "Document",
    "MemoryStore",
    "Order",
    "Split",
    "Store",
    "Tokenizer",
    "load_tokenizer",
    "read_corpus",
    "split_batch",
]
