"""A plan for people, and as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from rwkv_train.config import Config
from rwkv_train.console import ERROR_STYLE
from rwkv_train.models.registry import learning_rate_note
from rwkv_train.planning.goodput import DEFAULT_CLUSTER, between_failures, goodput, interval, saving
from rwkv_train.planning.plan import Plan

SMALL_VOCABULARY = 4096  # that of bytes, or one learnt from a small text
WIDE = 768  # channels of the smallest published model
PUBLISHED = "50,277 (Pile) or 65,536 (World)"  # their vocabularies
_LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimiser": "optimiser (Adam)",
    "activations": "activations",
    "logits": "logits",
    "buffers": "communication buffers",
    "statistics": "statistics of the state",
    "runtime": "libraries, allocator",
    "apart": "not at the same time",
}


def show(plan: Plan, config: Config, change: tuple[str, Plan] | None, console: Console) -> None:
    """Prints the table, whether it fits, and what would."""
    layout, needs, pace, card = plan.layout, plan.memory, plan.speed, plan.card
    counts, shape = plan.counts, plan.counts.shape
    console.print(
        f"model   {config.arch} {config.model.size}: L{shape.n_layer} C{shape.n_embd} V{shape.vocab_size}, "
        f"{counts.parameters:,} parameters, {counts.flops_per_token(layout.context):,} FLOPs a token"
    )
    if (
        config.model.vocab_size is None
        and shape.vocab_size <= SMALL_VOCABULARY + len(config.vocab.extend)
        and shape.n_embd >= WIDE
    ):
        console.print(
            f"        V{shape.vocab_size} is a small vocabulary; published models of this size have {PUBLISHED}: "
            "data.tokenizer=…, or model.vocab_size=… for a plan"
        )
    if note := learning_rate_note(shape, config.optim.lr, config.optim.final_lr):
        console.print(note)
    console.print(
        f"layout  {layout.strategy} on {layout.mesh.ranks} × {card.name}: context {layout.context} × micro-batch "
        f"{layout.micro} × {layout.mesh.ranks} devices × {layout.accumulation} passes, {config.trainer.precision}"
    )
    table = Table("of one device", "GB")
    for name, label in _LABELS.items():
        table.add_row(label, f"{getattr(needs, name) / 1e9:.2f}")
    table.add_row("together", f"{needs.device / 1e9:.2f}", style="bold")
    table.add_row("host memory", f"{needs.host / 1e9:.2f}")
    console.print(table)
    console.print(f"checkpoint  {needs.checkpoint / 1e9:,.1f} GB on the disk, {config.checkpoint.keep} are kept")
    stated = "stated" if config.mfu is not None else "estimated"
    link, kind = (card.network, "network") if layout.mesh.ranks > card.per_machine else (card.link, "link")
    console.print(
        f"a step      {pace.seconds:.3g} s, {pace.flops:.4g} FLOPs, {pace.tokens_per_second:,.0f} tokens/s "
        f"(MFU {pace.mfu:.0%}, {stated})"
    )
    console.print(
        f"network     {pace.sent / 1e9:.2f} GB sent a step by each device: {pace.network_seconds:.3g} s of "
        f"{link / 1e9:.0f} GB/s {kind}"
    )
    if (days := _days(plan, config)) is not None:
        console.print(f"the run     {days:.3g} days")
    losses = _survival(plan)
    nodes = f"{losses['nodes']} node" + "s" * (losses["nodes"] > 1)
    console.print(
        f"failures    one in {losses['hours_between_failures']:,.0f} h on {nodes} (as on {DEFAULT_CLUSTER}): "
        f"checkpoint.every.steps={losses['checkpoint_every_steps']:,} ({losses['checkpoint_every_minutes']:.0f} min) "
        f"leaves {losses['goodput']:.1%} of the time for training"
    )
    memory = f"{plan.held / 1e9:.1f} of {card.memory / 1e9:.1f} GB"
    if plan.fits:
        console.print(f"fits        {memory}")
    else:
        console.print(f"does not fit: {memory}", style=ERROR_STYLE)
        if not plan.gpu or plan.held <= card.memory:
            console.print(f"  host memory {needs.host / 1e9:.1f} GB a device, there are {card.host / 1e9:.1f}")
        console.print(f"  {advice(change)}")


def advice(change: tuple[str, Plan] | None) -> str:
    """What would fit, as overrides to type."""
    if change is None:
        return "nothing makes it fit on up to 4096 devices that can share this batch; batch.tokens=MORE lets more do so"
    overrides, plan = change
    return f"this fits: {overrides} ({plan.held / 1e9:.1f} GB)"


def as_json(plan: Plan, config: Config, change: tuple[str, Plan] | None) -> str:
    """The same figures as one JSON object on one line; bytes, seconds, FLOPs."""
    layout, needs, pace = plan.layout, plan.memory, plan.speed
    found: dict[str, Any] = {
        "device": plan.card.name,
        "devices": layout.mesh.ranks,
        "strategy": layout.strategy,
        "micro": layout.micro,
        "accumulation": layout.accumulation,
        "activation_checkpointing": layout.checkpointing,
        "parameters": plan.counts.parameters,
        "flops_per_token": plan.counts.flops_per_token(layout.context),
        "memory": {name: round(getattr(needs, name)) for name in _LABELS},
        "device_bytes": round(plan.held),
        "host_bytes": round(needs.host),
        "checkpoint_bytes": round(needs.checkpoint),
        "step_seconds": pace.seconds,
        "step_flops": pace.flops,
        "tokens_per_second": pace.tokens_per_second,
        "mfu": pace.mfu,
        "days": _days(plan, config),
        "sent_bytes_per_step": round(pace.sent),
        "network_seconds": pace.network_seconds,
        **_survival(plan),
        "fits": plan.fits,
        "change_that_fits": None if change is None else change[0],
    }
    return json.dumps(found)


def _days(plan: Plan, config: Config) -> float | None:
    if config.budget.total is None:
        return None
    return config.budget.total.in_steps(config.batch.tokens) * plan.speed.seconds / 86400


def _survival(plan: Plan) -> dict[str, Any]:
    """What failures cost, and how often to save."""
    layout, pace, per_machine = plan.layout, plan.speed.seconds, plan.card.per_machine
    nodes = -(-layout.mesh.ranks // per_machine)
    cost, failures = saving(plan.memory, layout, per_machine, pace), between_failures(nodes)
    steps = max(1, round(interval(cost, failures) / pace))
    return {
        "nodes": nodes,
        "hours_between_failures": failures / 3600,
        "checkpoint_pause_seconds": cost.pause,
        "checkpoint_write_seconds": cost.write,
        "checkpoint_every_steps": steps,
        "checkpoint_every_minutes": steps * pace / 60,
        "goodput": goodput(steps * pace, cost, failures),
    }
