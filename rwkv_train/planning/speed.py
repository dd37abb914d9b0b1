"""The time of a step: matrix products, operations bound by memory bandwidth, and the network."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_train.planning.cards import Card
from rwkv_train.planning.memory import FLOAT_BYTES, Layout
from rwkv_train.planning.model import Counts

# The constants of the model, one set for all cards. They are set here, and benchmarks/plan_accuracy.py compares them
# with every published run of RWKV that names its card.
MATMUL_SHARE = 0.55  # share of a card's matmul rate that large products of a training step reach
TRAFFIC_BYTES = 500  # bytes that a token moves, per channel and layer, forward and backward, outside of products
OVERLAP_SHARE = 0.7  # share of the computing time that communication can overlap


@dataclass(frozen=True)
class Speed:
    """Of one step.

    Args:
        seconds: of the step.
        tokens_per_second: of all ranks.
        mfu: model FLOPs utilisation, from 0 to 1.
        flops: of the model for one step, recomputation not counted.
        sent: bytes that one rank sends in a step.
        network_seconds: that the sending takes by itself.
    """

    seconds: float
    tokens_per_second: float
    mfu: float
    flops: float
    sent: float
    network_seconds: float


def speed(counts: Counts, layout: Layout, card: Card, precision: str, mfu: float | None = None) -> Speed:
    """The time of a step.

    Args:
        counts: of the model.
        layout: how the run is spread out.
        card: the device.
        precision: 32-true or bf16-mixed.
        mfu: stated or measured; None: from the constants.
    """
    tokens = layout.tokens * layout.accumulation  # of one rank
    rate, flops = card.rate(precision), tokens * counts.flops_per_token(layout.context)
    sent = traffic(counts, layout)
    across = layout.mesh.ranks > card.per_machine
    network = sent / (card.network if across else card.link)
    if mfu is not None:
        seconds = flops / (rate * mfu)
    else:
        computing = tokens * seconds_per_token(
            counts.flops_per_token(layout.context),
            counts.shape.n_layer,
            counts.shape.n_embd,
            recomputed_share(counts, layout),
            card,
            precision,
        )
        seconds = computing + max(0.0, network - OVERLAP_SHARE * computing)
    total = tokens * layout.mesh.data
    return Speed(seconds, total / seconds, flops / seconds / rate, flops * layout.mesh.ranks, sent, network)


def seconds_per_token(flops: int, n_layer: int, n_embd: int, recomputed: float, card: Card, precision: str) -> float:
    """Of one device's computing.

    Args:
        flops: of the forward and backward pass for one token.
        n_layer, n_embd: the model's shape.
        recomputed: the share of the forward pass that runs twice.
        card: the device.
        precision: 32-true or bf16-mixed.
    """
    again = 1 + recomputed / 3
    products = flops * again / (card.rate(precision) * MATMUL_SHARE)
    return products + TRAFFIC_BYTES * n_embd * n_layer * again / card.bandwidth


def recomputed_share(counts: Counts, layout: Layout) -> float:
    """Of the forward pass's products, those that activation checkpointing computes twice."""
    if not layout.checkpointing:
        return 0.0
    blocks = -(-counts.shape.n_layer // layout.checkpointing)
    return blocks * counts.block_matmul / counts.matmul


def traffic(counts: Counts, layout: Layout) -> float:
    """Bytes that a rank sends in a step; a ring sends (n - 1) / n of what is reduced, and of what is gathered.

    DDP and ZeRO-1 reduce at the last pass of a step, the others in each; ZeRO-3 and FSDP2 gather the parameters for
    the forward and for the backward pass of each.
    """
    ring = (layout.mesh.ranks - 1) / layout.mesh.ranks
    volume, passes = FLOAT_BYTES * counts.trainable * ring, layout.accumulation
    gathered = layout.gathered_bytes * counts.parameters * ring
    if layout.stage == 0:
        return 2 * volume
    if layout.stage == 3:
        return passes * (2 * gathered + volume)
    return volume * (passes if layout.stage == 2 else 1) + volume
