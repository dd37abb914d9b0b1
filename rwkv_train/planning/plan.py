"""A plan: one config on one card, what it needs and whether it fits, and the smallest change that does."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from rwkv_train.config import Config
from rwkv_train.config.mesh import Mesh
from rwkv_train.data.order import split_batch
from rwkv_train.errors import UserError
from rwkv_train.planning.cards import Card
from rwkv_train.planning.memory import Layout, Memory, memory
from rwkv_train.planning.model import Counts, count, model_config
from rwkv_train.planning.speed import Speed, speed

MAX_MEMORY_SHARE = 0.95  # of a device's memory, that a plan may use
# as strategy=auto tries them after the given one, each with more sharding
SHARDED_STRATEGIES = ("deepspeed_1", "deepspeed_2", "deepspeed_3", "deepspeed_2_offload", "deepspeed_3_offload")
MAX_DEVICES = 4096


@dataclass(frozen=True)
class Plan:
    """What a run needs, on each of its devices."""

    card: Card
    gpu: bool
    counts: Counts
    layout: Layout
    memory: Memory
    speed: Speed

    @property
    def held(self) -> float:
        """Bytes of a device's memory; where it has none of its own, of the host's."""
        return self.memory.device if self.gpu else self.memory.device + self.memory.host

    @property
    def fits(self) -> bool:
        return self.held <= MAX_MEMORY_SHARE * self.card.memory and (not self.gpu or self.memory.host <= self.card.host)


def make_plan(config: Config, card: Card, mesh: Mesh, vocab_size: int, gpu: bool = True) -> Plan:
    """The plan of a config; `strategy=auto` becomes the first that fits, from replicas to more and more sharding.

    A micro-batch that is not given becomes the largest that fits: a device's full share, or half of it, a quarter …

    Args:
        config: settled and checked.
        card: the device.
        mesh: all ranks.
        vocab_size: the tokenizer's; model.vocab_size counts before it.
        gpu: whether the device has a memory of its own.

    Raises:
        UserError: the global batch cannot be shared out over that many devices.
    """
    counts = count(model_config(config, vocab_size), config.trainer.precision)
    split = split_batch(config.batch.tokens, config.batch.context, config.batch.micro, mesh)
    layout = Layout(
        "single" if mesh.ranks == 1 else "ddp",
        mesh,
        split.micro,
        config.batch.context,
        split.accumulation,
        int(config.activation_checkpointing),
        config.trainer.precision == "bf16-mixed",
    )

    def planned(layout: Layout) -> Plan:
        needs = memory(counts, layout, gpu, config.checkpoint.background)
        return Plan(card, gpu, counts, layout, needs, speed(counts, layout, card, config.trainer.precision, config.mfu))

    names = (layout.strategy, *SHARDED_STRATEGIES) if config.strategy == "auto" else (config.strategy,)
    passes = [1] if config.batch.micro is not None else divisors(layout.micro)
    tried: list[Plan] = []
    for name, cut in itertools.product(names, passes):
        cut_layout = replace(layout, micro=layout.micro // cut, accumulation=layout.accumulation * cut)
        tried.append(planned(replace(cut_layout, strategy=name)))
        if tried[-1].fits:
            return tried[-1]
    return min(tried, key=lambda plan: plan.held)


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def why(plan: Plan) -> str:
    """In one line, why strategy=auto and a micro-batch that is not given are what they are."""
    name, held = plan.layout.strategy, f"{plan.held / 1e9:.1f} of {plan.card.memory / 1e9:.0f} GB"
    many = plan.layout.accumulation
    passes = f" in {many} passes a step" if many > 1 else ""
    if name in ("single", "ddp"):
        return f"strategy=auto: {name}: a whole copy fits{passes} ({held})"
    return f"strategy=auto: {name}: the first that fits{passes} ({held}); sharing less does not"


def smallest_change(config: Config, plan: Plan, vocab_size: int) -> tuple[str, Plan] | None:
    """The settings that make a config fit whose plan does not; None: nothing does on up to 4096 devices.

    Of the strategies it is the first of strategy=auto that fits; before more devices are taken, the micro-batch is
    cut down to one sample, then every block is recomputed in the backward pass.

    Args:
        config: of the plan.
        plan: one that does not fit.
        vocab_size: as in `make_plan`.

    Returns:
        the settings to type, and the plan with them.
    """
    mesh, micro = plan.layout.mesh, config.batch.micro
    micros = [None] if micro is None else divisors(micro)[::-1]
    recompute = dict.fromkeys((config.activation_checkpointing, True))
    devices = [mesh.data << n for n in range(MAX_DEVICES.bit_length()) if mesh.data << n <= MAX_DEVICES]
    for data, checkpointing, size in itertools.product(devices, recompute, micros):
        batch = replace(config.batch, micro=size)
        candidate = replace(config, strategy="auto", batch=batch, activation_checkpointing=checkpointing)
        try:
            found = make_plan(candidate, plan.card, replace(mesh, data=data), vocab_size, plan.gpu)
        except UserError:
            continue  # that many devices cannot share this batch
        if found.fits:
            return " ".join(_typed(config, plan, candidate, found)), found
    return None


def _typed(config: Config, plan: Plan, candidate: Config, found: Plan) -> list[str]:
    """The settings that lead from a config to a candidate, as they are typed."""
    typed: list[str] = []
    strategy = "auto" if found.layout.strategy == "single" else found.layout.strategy
    if found.layout.mesh != plan.layout.mesh:
        typed += _devices(found.layout.mesh.ranks, plan.card.per_machine)
    if strategy != config.strategy and not (config.strategy == "auto" and strategy == "ddp"):
        typed.append(f"strategy={strategy}")
    if candidate.batch.micro != config.batch.micro:
        typed.append(f"batch.micro={candidate.batch.micro}")
    if candidate.activation_checkpointing != config.activation_checkpointing:
        typed.append("activation_checkpointing=true")
    return typed


def _devices(devices: int, per_machine: int) -> list[str]:
    machines = max(1, devices // per_machine)
    return [f"trainer.devices={devices // machines}"] + ([f"trainer.num_nodes={machines}"] if machines > 1 else [])
