"""Bytes that one rank holds while it trains, by what they are for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rwkv_train.config import EVIDENCE_BYTES, LOGITS_AT_ONCE
from rwkv_train.config.mesh import Mesh
from rwkv_train.planning.model import Counts

FLOAT_BYTES = 4  # bytes: weights, gradients and Adam's moments are float32 under every strategy
DDP_BUCKET = 25 * 2**20
BUCKET_ELEMENTS = 200_000_000  # elements, the most that DeepSpeed sends at a time
CUDA_BYTES = 1.2e9  # bytes of a GPU that CUDA's context, its libraries and the unused memory of the allocator take
FIRST_STEP_BYTES = 0.04e9  # bytes of a CPU's process for what its first step loads: library pages, MKL panels, modules
DEEPSPEED_BYTES = 0.06e9  # the same, of DeepSpeed's engine
PROCESS_BYTES = 0.9e9  # bytes of the host's memory that a process takes by itself


@dataclass(frozen=True)
class Layout:
    """How a run is spread out.

    Args:
        strategy: single, or a name of conf/strategy but auto.
        mesh: all ranks.
        micro: samples of one pass on one device.
        context: tokens of a sample.
        accumulation: passes of a step.
        checkpointing: every n-th block is recomputed in the backward pass; 0: none.
        mixed: whether products are computed in bfloat16.
    """

    strategy: str
    mesh: Mesh
    micro: int
    context: int
    accumulation: int
    checkpointing: int
    mixed: bool

    @property
    def stage(self) -> int:
        """What is shared out: 0 nothing, 1 the optimiser state, 2 gradients too, 3 parameters too."""
        return 3 if self.strategy == "fsdp" else int(self.strategy[10]) if "deepspeed" in self.strategy else 0

    @property
    def offload(self) -> bool:
        return self.strategy.endswith("_offload")

    @property
    def gathered_bytes(self) -> int:
        """Of an element of a parameter that is gathered: FSDP2 gathers in the products' dtype, ZeRO-3 in float32."""
        return 2 if self.mixed and self.strategy == "fsdp" else FLOAT_BYTES

    @property
    def tokens(self) -> int:
        """Of one pass on one device."""
        return self.micro * self.context


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank; `host` is the host's share of them, `device` the sum of the others."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    logits: float
    buffers: float
    statistics: float
    runtime: float
    apart: float  # less than 0: counted above, but not held at the same time as the rest
    host: float
    checkpoint: float  # on the disk, of all ranks together

    @property
    def device(self) -> float:
        held = (getattr(self, field.name) for field in fields(self) if field.name not in ("host", "checkpoint"))
        return float(sum(held))


def memory(counts: Counts, layout: Layout, gpu: bool = True, background: bool = True) -> Memory:
    """What a rank holds at the height of a step.

    Args:
        counts: of the model.
        layout: how the run is spread out.
        gpu: whether the devices have a memory of their own; else all is the host's.
        background: whether checkpoints are written from a copy.
    """
    all_weights, complete = FLOAT_BYTES * counts.parameters, FLOAT_BYTES * counts.trainable
    part = complete / layout.mesh.ranks  # as `complete`, of the trainable parameters
    stage, deepspeed = layout.stage, "deepspeed" in layout.strategy
    weights = all_weights / layout.mesh.ranks if stage == 3 else all_weights
    gradients = complete if stage < 2 else part
    if deepspeed and stage == 1 and layout.accumulation > 1:
        gradients += part  # of the passes before, averaged, apart from this one's
    optimiser = (3 if deepspeed else 2) * part if stage else 2 * complete
    kept, at_once = activations(counts, layout), logits(counts, layout)
    examined = statistics(counts, layout)
    buffers = _buffers(counts, layout)
    host = PROCESS_BYTES
    if layout.offload:
        host += optimiser + part
        optimiser, gradients = 0.0, gradients if stage == 1 else 0.0
        if stage == 3:
            host, weights = host + weights, 0.0
    apart = 0.0
    if not gpu and stage == 3:
        buffers += min(counts.block, BUCKET_ELEMENTS) * FLOAT_BYTES  # gloo reduces and gathers in a copy of its input
    elif not gpu and stage:
        buffers = (
            min(counts.block, BUCKET_ELEMENTS) * FLOAT_BYTES + complete
        )  # one bucket at a time; all updated weights are gathered together
        apart = _not_at_once(counts, layout, gradients, kept + at_once + examined, buffers)
    state = all_weights + 2 * complete
    if background:
        host += state / layout.mesh.ranks if stage else state
    return Memory(
        weights=weights,
        gradients=gradients,
        optimiser=optimiser,
        activations=kept,
        logits=at_once,
        buffers=buffers,
        statistics=examined,
        runtime=CUDA_BYTES if gpu else FIRST_STEP_BYTES + DEEPSPEED_BYTES * deepspeed,
        apart=apart,
        host=host,
        checkpoint=state,
    )


def activations(counts: Counts, layout: Layout) -> float:
    """What the forward pass keeps for the backward pass, and what that needs besides at its height."""
    every, blocks = layout.checkpointing, counts.shape.n_layer
    recomputed = -(-blocks // every) if every else 0
    kept = (blocks - recomputed) * counts.block_saved + recomputed * counts.stream
    if recomputed:
        kept += counts.block_saved
    casts = counts.block_casts * (blocks - recomputed if layout.stage < 3 else 1)
    return layout.tokens * (kept + counts.ends_saved + counts.block_extra) + casts


def logits(counts: Counts, layout: Layout) -> float:
    """Of the head: logits, their float32 copy and gradient, at most LOGITS_AT_ONCE of them at a time."""
    at_once = min(layout.tokens * counts.shape.vocab_size, LOGITS_AT_ONCE)
    hidden = layout.tokens * counts.shape.n_embd * FLOAT_BYTES
    return at_once * (counts.logit + 2 * FLOAT_BYTES) + 2 * hidden


def statistics(counts: Counts, layout: Layout) -> float:
    """Of the copies of the recurrent state that are examined after each pass: EVIDENCE_BYTES, or one layer's state."""
    states = layout.micro * counts.state_bytes
    return max(min(states, EVIDENCE_BYTES), states / counts.shape.n_layer)


def _buffers(counts: Counts, layout: Layout) -> float:
    """Of collectives, and of parameters that are gathered for a moment."""
    if layout.strategy == "single":
        return 0.0
    if layout.stage == 0:
        return DDP_BUCKET
    if layout.strategy == "fsdp":
        gathered = 2 * max(counts.block, counts.largest)
        return gathered * layout.gathered_bytes + max(counts.block, counts.largest) * FLOAT_BYTES
    bucket = min(counts.block, BUCKET_ELEMENTS) * FLOAT_BYTES
    if layout.stage < 3:
        return 2 * bucket + counts.largest * FLOAT_BYTES
    gathered = 2 * counts.block + counts.largest
    return 2 * bucket + gathered * layout.gathered_bytes + counts.largest * FLOAT_BYTES


def _not_at_once(counts: Counts, layout: Layout, gradients: float, kept: float, buffers: float) -> float:
    """Bytes, counted below zero, that up to stage 2 on CPUs are not held together: there freed pages are given back.

    Gradients fill their pages while the backward pass frees activations, if a step is one pass; and the copy of all
    weights is made after Adam's step, when both have been freed.
    """
    back = buffers - FLOAT_BYTES * counts.trainable
    block = layout.tokens * (counts.block_saved + counts.block_extra)
    height = gradients + kept + back if layout.accumulation > 1 else max(gradients + block + back, kept)
    return max(height, FLOAT_BYTES * counts.trainable) - gradients - kept - buffers
