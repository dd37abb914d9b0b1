"""From documents to a token store: `rwkv-train prepare`.

units.py cuts what is to be read into units, shards.py makes a shard of each in a process of its own, pipeline.py keeps
the processes busy and joins the shards, examine.py looks at a store afterwards.
"""

from rwkv_train.data.prepare.pipeline import Job, prepare

__all__ = ["Job", "prepare"]
