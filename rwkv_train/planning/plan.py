"""A plan: one config on one card, what it needs and whether it fits, and the smallest change that does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rwkv_train.config import Config
from rwkv_train.data.order import split_batch
from rwkv_train.errors import UserError
from rwkv_train.planning.cards import Card
from rwkv_train.planning.memory import Layout, Memory, memory
from rwkv_train.planning.model import Counts, count, model_config
from rwkv_train.planning.speed import Speed, speed

HEADROOM = 0.95  # share of a device's memory that a plan may fill
SHARING = ("deepspeed_1", "deepspeed_2", "deepspeed_3", "deepspeed_2_offload", "deepspeed_3_offload")  # ever more
MOST_DEVICES = 4096


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
        return self.held <= HEADROOM * self.card.memory and (not self.gpu or self.memory.host <= self.card.host)

    @property
    def spare(self) -> float:
        return self.card.memory - self.held


def make_plan(config: Config, card: Card, ranks: int, vocab_size: int, gpu: bool = True) -> Plan:
    """The plan of a config; `strategy=auto` becomes the first that fits, from whole copies to ever more sharing.

    A micro-batch that is not given becomes the largest that fits: a device's whole share, or half of it, a quarter …

    Args:
        config: settled and checked.
        card: the device.
        ranks: devices of all machines.
        vocab_size: the tokenizer's; model.vocab_size counts before it.
        gpu: whether the device has a memory of its own.

    Raises:
        UserError: the global batch cannot be shared out over that many devices.
    """
    counts = count(model_config(config, vocab_size), config.trainer.precision)
    split = split_batch(config.batch.tokens, config.batch.context, config.batch.micro, ranks)
    layout = Layout(
        "single" if ranks == 1 else "ddp",
        ranks,
        split.micro,
        config.batch.context,
        split.accumulation,
        int(config.activation_checkpointing),
        config.trainer.precision == "bf16-mixed",
    )

    def planned(layout: Layout) -> Plan:
        needs = memory(counts, layout, gpu, config.checkpoint.background)
        return Plan(card, gpu, counts, layout, needs, speed(counts, layout, card, config.trainer.precision, config.mfu))

    names = (layout.strategy, *SHARING) if config.strategy == "auto" else (config.strategy,)
    passes = [1]
    while config.batch.micro is None and layout.micro % (2 * passes[-1]) == 0:
        passes.append(2 * passes[-1])
    tried: list[Plan] = []
    for name, cut in itertools.product(names, passes):
        cut_layout = replace(layout, micro=layout.micro // cut, accumulation=layout.accumulation * cut)
        tried.append(planned(replace(cut_layout, strategy=name)))
        if tried[-1].fits:
            return tried[-1]
    return min(tried, key=lambda plan: plan.held)


def why(plan: Plan) -> str:
    """In one line, why strategy=auto and a micro-batch that is not given are what they are."""
    name, held = plan.layout.strategy, f"{plan.held / 1e9:.1f} of {plan.card.memory / 1e9:.0f} GB"
    many = plan.layout.accumulation
    passes = f" in {many} passes a step" if many > 1 else ""
    if name in ("single", "ddp"):
        return f"strategy=auto: {name}: a whole copy fits{passes} ({held})"
    return f"strategy=auto: {name}: the first that fits{passes} ({held}); sharing less does not"


def smallest_change(config: Config, plan: Plan, vocab_size: int) -> tuple[str, Plan] | None:
    """The words that make a plan fit which does not, fewest and mildest first; None: up to 4096 devices none do."""
    for words, changed, ranks in _changes(config, plan):
        try:
            found = make_plan(changed, plan.card, ranks, vocab_size, plan.gpu)
        except UserError:
            continue  # that many devices cannot share this batch
        if found.fits:
            settled = changed.strategy == "auto" and found.layout.strategy not in ("single", "ddp")
            return " ".join(words + [f"strategy={found.layout.strategy}"] * settled), found
    return None


def _changes(config: Config, plan: Plan) -> Iterator[tuple[list[str], Config, int]]:
    """Changed configs, mildest first: what costs nothing, what costs time, what costs devices."""
    layout, ranks = plan.layout, plan.layout.ranks
    name = layout.strategy
    stronger = SHARING[SHARING.index(name) + 1 :] if name in SHARING else SHARING if name != "fsdp" else SHARING[4:]
    strategies: list[tuple[int, str | None]] = [(0, None)]
    strategies += [(1 + 2 * ("offload" in other), other) for other in stronger if ranks > 1 or "offload" in other]
    checkpointing = [(0, False)] if layout.checkpointing == 1 else [(0, False), (1, True)]
    micros: list[tuple[int, int | None]] = [(0, None)]
    micros += [
        (steps, micro)
        for steps in range(1, 8)
        if (micro := layout.micro >> steps) >= 1 and layout.micro % micro == 0 and micro << steps == layout.micro
    ]
    more = [(0, ranks)]
    factor = 2
    while ranks * factor <= MOST_DEVICES:
        more.append((3 * factor.bit_length(), ranks * factor))
        factor *= 2
    found: list[tuple[int, int, str | None, bool, int | None, int]] = []
    options = itertools.product(strategies, checkpointing, micros, more)
    for number, ((strategy_cost, strategy), (time_cost, recompute), (micro_cost, fewer), (cost, devices)) in enumerate(
        options
    ):
        if total := strategy_cost + time_cost + micro_cost + cost:
            found.append((total, number, strategy, recompute, fewer, devices))
    for _, _, strategy, recompute, fewer, devices in sorted(found, key=lambda change: change[:2]):
        words, changed = [], config
        if devices != ranks:
            words += _devices(devices, plan.card.per_machine)
            if strategy is None and name == "single":
                changed = replace(changed, strategy="auto")
        if strategy is not None:
            words.append(f"strategy={strategy}")
            changed = replace(changed, strategy=strategy)  # type: ignore[arg-type]
        if recompute:
            words.append("activation_checkpointing=true")
            changed = replace(changed, activation_checkpointing=True)
        if fewer is not None:
            words.append(f"batch.micro={fewer}")
            changed = replace(changed, batch=replace(changed.batch, micro=fewer))
        yield words, changed, devices


def _devices(devices: int, per_machine: int) -> list[str]:
    machines = max(1, devices // per_machine)
    return [f"trainer.devices={devices // machines}"] + ([f"trainer.num_nodes={machines}"] if machines > 1 else [])
