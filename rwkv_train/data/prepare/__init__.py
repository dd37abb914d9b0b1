"""From documents to a token store: `rwkv-train prepare`.

units.py divides the input into units of work, shards.py tokenises a unit into a shard in a worker process, pipeline.py
schedules the workers and joins the shards, examine.py inspects and verifies a finished store.
"""

from rwkv_train.data.prepare.pipeline import PrepareOptions, prepare

__all__ = ["PrepareOptions", "prepare"]
