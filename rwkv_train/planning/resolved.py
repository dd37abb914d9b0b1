"""What a run really uses: every `auto` of the configuration settled, once, from the hardware and the data.

`Config` is what the user asked for. `find_devices` looks at the hardware, `resolve` chooses strategy and micro-batch;
setup.py calls both, and everything after it reads the ResolvedConfig alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch
from rich.console import Console

from rwkv_train import resources
from rwkv_train.config import Config
from rwkv_train.config.mesh import Mesh
from rwkv_train.errors import UserError
from rwkv_train.planning.cards import Card, card_of, cpu_card, present_card, ranks_of
from rwkv_train.planning.model import model_config, parameters
from rwkv_train.planning.plan import Plan, make_plan, smallest_change, why
from rwkv_train.planning.report import advice

Accelerator = Literal["cpu", "gpu"]

SMALL_STATE = 0.05  # share of the memory below which a model's state fits without a plan, which would take a second
STATE_BYTES = 16  # of a parameter: weight, gradient and Adam's two moments in float32


@dataclass(frozen=True)
class Devices:
    """The devices of a run: what is known before its data are read.

    Attributes:
        accelerator: "cpu" or "gpu".
        per_node: ranks of one node.
        nodes: number of nodes.
        precision: "bf16-mixed" or "32-true".
        threads: CPU threads of each rank.
        card: figures of one device, for plans.
        source: why the card is this one, for people.
    """

    accelerator: Accelerator
    per_node: int
    nodes: int
    precision: str
    threads: int
    card: Card
    source: str

    @property
    def gpu(self) -> bool:
        return self.accelerator == "gpu"

    @property
    def mesh(self) -> Mesh:
        """All ranks are data-parallel."""
        return Mesh(self.per_node * self.nodes)

    def recorded(self, config: Config) -> Config:
        """The config as config.yaml and checkpoints hold it: as asked for, with the precision that was chosen.

        The precision is part of what is computed, so that a resume keeps it; devices, strategy and micro-batch may
        change between two attempts.
        """
        return replace(config, trainer=replace(config.trainer, precision=self.precision))


@dataclass(frozen=True)
class ResolvedConfig(Devices):
    """What runs. Nothing in it is open: no `auto`, no None.

    Attributes:
        strategy: "single", or a name of conf/strategy other than "auto".
        micro: samples of a micro-batch, which one rank computes in one pass.
        accumulation: micro-batches of a step on each rank.
    """

    strategy: str
    micro: int
    accumulation: int

    def plan(self, config: Config, vocab_size: int) -> Plan:
        """The plan of what runs: memory, FLOPs and network of a step.

        Raises:
            UserError: a layout that no plan covers.
        """
        settled = replace(
            self.recorded(config),
            strategy=self.strategy,  # type: ignore[arg-type]  # also "single"
            batch=replace(config.batch, micro=self.micro),
        )
        return make_plan(settled, self.card, self.mesh, vocab_size, self.gpu)


def find_devices(config: Config) -> Devices:
    """The devices that a run uses, with the settings that depend on them.

    Args:
        config: with dry_run, of a run on devices that need not be present.

    Raises:
        UserError: devices that are asked for and not present, or that cannot compute in the precision asked for.
    """
    if config.dry_run:
        card, source = card_of(config)
        accelerator: Accelerator = "cpu" if card.name == "cpu" else "gpu"
        per_node, bfloat16 = ranks_of(config, card) // config.trainer.node_count, accelerator == "gpu"
    else:
        accelerator, per_node = _present_devices(config)
        gpu = accelerator == "gpu"
        card, source = (present_card() if gpu else None) or cpu_card(per_node), "the one present"
        bfloat16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = config.trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if bfloat16 else "32-true"
    return Devices(
        accelerator=accelerator,
        per_node=per_node,
        nodes=config.trainer.node_count,
        precision=precision,
        threads=config.threads or max(1, resources.cpu_cores() // (per_node if accelerator == "cpu" else 1)),
        card=card,
        source=source,
    )


def resolve(config: Config, devices: Devices, vocab_size: int, samples: int, console: Console) -> ResolvedConfig:
    """Chooses what the config leaves open: the strategy and the micro-batch.

    Args:
        config: as asked for.
        devices: of the run.
        vocab_size: of the model.
        samples: of the global batch.
        console: where the choice is explained, if it took a plan.

    Raises:
        UserError: a strategy whose package is not installed, or a model that does not fit into the devices' memory.
    """
    mesh = devices.mesh
    strategy, micro = _choose(config, devices, vocab_size, samples // mesh.data, console)
    if strategy.startswith("deepspeed") and find_spec("deepspeed") is None:
        raise UserError(f"strategy={strategy} needs deepspeed, which is not installed", "pip install deepspeed")
    accumulation = samples // (mesh.data * micro)
    return ResolvedConfig(**vars(devices), strategy=strategy, micro=micro, accumulation=accumulation)


def _choose(config: Config, devices: Devices, vocab_size: int, share: int, console: Console) -> tuple[str, int]:
    """The strategy's name and the samples of a micro-batch; `share` are a rank's samples of a step."""
    card, mesh, gpu = devices.card, devices.mesh, devices.gpu
    state = STATE_BYTES * parameters(model_config(config, vocab_size))
    if config.strategy == "auto" and state < SMALL_STATE * card.memory:
        return "single" if mesh.ranks == 1 else "ddp", config.batch.micro or share
    recorded = devices.recorded(config)
    plan = make_plan(recorded, card, mesh, vocab_size, gpu)
    if not plan.fits and not config.dry_run:
        raise UserError(
            f"model={config.model.size} does not fit {mesh.ranks} × {card.name} with strategy={plan.layout.strategy}: "
            f"{plan.held / 1e9:.1f} GB a device, it has {card.memory / 1e9:.1f}",
            advice(smallest_change(recorded, plan, vocab_size)),
        )
    if config.strategy == "auto" and not config.dry_run:
        console.print(why(plan))
    return plan.layout.strategy, plan.layout.micro


def _present_devices(config: Config) -> tuple[Accelerator, int]:
    """The accelerator and the ranks of this node, of the devices that are present."""
    wanted, devices = config.trainer.accelerator, config.trainer.devices
    present = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not present):
        processes = 1 if devices == "auto" else int(devices)
        if processes > (cores := resources.cpu_cores()):
            raise UserError(
                f"trainer.devices={processes}: this machine has {cores} CPU cores and no GPU that torch can use",
                f"trainer.devices={cores}",
            )
        return "cpu", processes
    processes = present if devices == "auto" else int(devices)
    if not present or processes > present:
        raise UserError(
            f"trainer.accelerator={wanted} trainer.devices={devices}: torch can use {present} GPUs here",
            f"trainer.devices={present}" if present else "trainer.accelerator=cpu",
        )
    if config.trainer.precision == "bf16-mixed" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"trainer.precision=bf16-mixed: {torch.cuda.get_device_name()} has no bfloat16", "trainer.precision=32-true"
        )
    return "gpu", processes
