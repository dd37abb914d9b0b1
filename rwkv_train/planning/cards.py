"""Data sheets of the devices that a plan knows. Imports torch only to find the GPU of this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rwkv_train.config import Config
from rwkv_train.errors import UserError


@dataclass(frozen=True)
class Card:
    """A device, all figures for one of them.

    Args:
        name: as it is typed: device=h100-80g.
        memory: bytes.
        bf16, f32: floating-point operations per second of a matrix product, dense.
        bandwidth: of its memory, bytes per second.
        link: to the other devices of the same machine, bytes per second, each way.
        network: its share of the machine's network, bytes per second, each way.
        per_machine: devices of one machine.
        host: its share of the machine's own memory, bytes.
    """

    name: str
    memory: float
    bf16: float
    f32: float
    bandwidth: float
    link: float
    network: float
    per_machine: int = 8
    host: float = 250e9

    def rate(self, precision: str) -> float:
        return self.bf16 if precision.startswith("bf16") else self.f32


_GIB = 2**30
CARDS = {
    card.name: card
    for card in (
        Card("a100-40g", 40 * _GIB, 312e12, 19.5e12, 1555e9, 300e9, 25e9, host=125e9),
        Card("a100-80g", 80 * _GIB, 312e12, 19.5e12, 2039e9, 300e9, 25e9),
        Card("h100-80g", 80 * _GIB, 989e12, 67e12, 3350e9, 450e9, 50e9),
        Card("h200-141g", 141e9, 989e12, 67e12, 4800e9, 450e9, 50e9),
        Card("b200-180g", 180e9, 2250e12, 75e12, 7700e9, 900e9, 50e9, host=500e9),
        Card("l40s-48g", 48 * _GIB, 362e12, 91.6e12, 864e9, 32e9, 12.5e9, host=125e9),
        Card("rtx4090-24g", 24 * _GIB, 165e12, 82.6e12, 1008e9, 25e9, 1.25e9, host=32e9),
        Card("rtx3090-24g", 24 * _GIB, 71e12, 35.6e12, 936e9, 25e9, 1.25e9, host=32e9),
    )
}
DEFAULT_CARD = "h100-80g"


def find_card(name: str) -> Card:
    """The card of that name.

    Raises:
        UserError: it is not known.
    """
    if name not in CARDS:
        raise UserError(f"device={name}: there is no such card", f"valid: {', '.join(CARDS)}")
    return CARDS[name]


def cpu_card(processes: int) -> Card:
    """One of several processes that share this machine's CPU (25 GFLOP/s in float32 a core, 10 GB/s each)."""
    import psutil

    memory, cores = psutil.virtual_memory().total / processes, max(1, (psutil.cpu_count() or 1) // processes)
    rate = 25e9 * cores
    return Card("cpu", memory, rate / 2, rate, 10e9, 2e9, 1e9, processes, memory)


def present_card() -> Card | None:
    """The GPU of this machine, with the figures of the table where its name is known there; None: there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    product = re.sub("[^a-z0-9]", "", properties.name.lower())  # NVIDIA A100-SXM4-80GB, NVIDIA GeForce RTX 4090
    alike = [card for card in CARDS.values() if card.name.split("-")[0] in product]
    near = min(alike or CARDS.values(), key=lambda card: abs(card.memory - properties.total_memory))
    name = near.name if alike else properties.name
    return replace(near, name=name, memory=properties.total_memory, per_machine=torch.cuda.device_count())


def card_of(config: Config) -> tuple[Card, str]:
    """The card that a plan is made for, and why it is this one."""
    if config.trainer.accelerator == "cpu":
        processes = 1 if config.trainer.devices == "auto" else int(config.trainer.devices)
        return cpu_card(processes), "this machine's CPU (trainer.accelerator=cpu)"
    if config.device is not None:
        return find_card(config.device), f"{config.device} (device=)"
    present = present_card()
    if present is not None:
        return present, f"{present.name} (the one present)"
    return CARDS[DEFAULT_CARD], f"{DEFAULT_CARD} (no GPU is present; device= chooses another: {', '.join(CARDS)})"


def ranks_of(config: Config, card: Card) -> int:
    """Devices of all nodes; `auto` means the present ones, or one if there are none."""
    import torch

    devices = config.trainer.devices
    here = torch.cuda.device_count() if card.name != "cpu" and torch.cuda.is_available() else 1
    return (here if devices == "auto" else int(devices)) * config.trainer.node_count
