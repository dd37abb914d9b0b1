"""Our settings as frozen dataclasses, with the bounds of each value.

conf/*.yaml holds the values, this file their types, words.py leads from what a user types to a Config and back, and
checks.py says what must hold between several settings. None of them imports torch: a mistake is told within a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

LOGITS_AT_ONCE = 2**24  # the head and the loss go over at most so many logits at a time (64 MiB in float32)


@dataclass(frozen=True)
class Bound:
    """What a number must hold beyond its type."""

    valid: str  # for people: "at least 1"
    holds: Callable[[float], bool]


Positive = Annotated[int, Bound("at least 1", lambda n: n >= 1)]
NotNegative = Annotated[int, Bound("at least 0", lambda n: n >= 0)]
Above0 = Annotated[float, Bound("above 0", lambda x: x > 0)]
From0 = Annotated[float, Bound("at least 0", lambda x: x >= 0)]
Share = Annotated[float, Bound("from 0 up to, but not, 1", lambda x: 0 <= x < 1)]


@dataclass(frozen=True)
class Duration:
    """A span of training: a number of optimiser steps or of tokens (exactly one is given)."""

    steps: int | None = None
    tokens: int | None = None

    def in_steps(self, tokens_per_step: int) -> int:
        """The span in optimiser steps, rounded up."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // tokens_per_step)


@dataclass(frozen=True)
class ModelSettings:
    size: str  # name of the file in conf/model
    n_layer: Positive
    n_embd: Annotated[int, Bound("at least 2", lambda n: n >= 2)]  # the curves over channels divide by n_embd - 1
    dim_ffn: Positive | None  # None: the generation's default (RWKV-4: 4 n_embd)
    vocab_size: Positive | None  # None: the tokenizer's


@dataclass(frozen=True)
class SourceSettings:
    """One source of a mixture."""

    name: str
    path: str  # of a store, a glob of stores, or text
    weight: From0 | None  # share of the tokens, relative to the others'; None: as many as it has
    epochs: Above0 | None  # how often it may be read at most; None: without end


@dataclass(frozen=True)
class StageSettings:
    """Other weights of a mixture from a token on."""

    tokens: Positive
    weights: dict[str, Any]  # source → weight; what is not named has weight 0


@dataclass(frozen=True)
class DataSettings:
    source: Literal["stdlib", "text", "store", "mixture", "chat", "stream"]
    path: str | None  # a file or directory; None: the running Python's standard library
    tokenizer: str | None  # bytes, world or a tokenizer.json; None: the store's own, or bytes
    hold_out: Share  # held out for validation: files by a hash of their names, of a store the last documents
    order: Literal["shuffled", "reference"] = "shuffled"
    documents: Literal["stream", "packed"] = "stream"
    reset: bool = False  # packed documents know nothing of each other
    sources: tuple[SourceSettings, ...] = ()
    curriculum: tuple[StageSettings, ...] = ()
    template: str | None = None  # of a chat's messages; None: RWKV World's
    field: str = "text"  # of a streamed row
    split: str = "train"  # of a streamed data set
    held_out_documents: NotNegative = 100  # of a stream: its first ones
    workers: NotNegative = 1  # processes that tokenise a stream; 0: the training process does


@dataclass(frozen=True)
class VocabSettings:
    extend: tuple[str, ...] = ()  # texts that become a token each, behind the tokenizer's own


@dataclass(frozen=True)
class BatchSettings:
    tokens: Positive  # global, per optimiser step
    context: Positive  # tokens of one sample
    micro: Positive | None  # samples per device and pass; None: as many as the global batch gives one device


@dataclass(frozen=True)
class BudgetSettings:
    total: Duration | None = field(metadata={"word": "budget"})  # budget.steps= or budget.tokens=
    hours: Above0 | None  # stop after this much wall-clock time, resumable


@dataclass(frozen=True)
class ScheduleSettings:
    shape: Literal["constant", "exponential", "cosine"]
    warmup: Duration
    hold: Duration  # constant at lr after warm-up, before the decay


@dataclass(frozen=True)
class GroupRule:
    """An override of the recipe for the parameters whose names match the pattern."""

    pattern: str
    lr: From0 | None  # multiplier
    weight_decay: bool | None


@dataclass(frozen=True)
class OptimSettings:
    lr: Above0
    final_lr: From0
    betas: tuple[Share, Share]
    eps: Above0
    weight_decay: From0
    clip: Above0 | None  # gradient norm
    l2wrap: From0
    schedule: ScheduleSettings
    rules: tuple[GroupRule, ...] = ()


@dataclass(frozen=True)
class TrainerSettings:
    accelerator: Literal["auto", "cpu", "gpu", "cuda"]
    devices: Literal["auto"] | Positive
    num_nodes: Literal["auto"] | Positive  # auto: those of the job
    precision: str

    @property
    def machines(self) -> int:
        """Nodes; auto is settled by then wherever the run is part of a job."""
        return 1 if self.num_nodes == "auto" else self.num_nodes


@dataclass(frozen=True)
class RunSettings:
    name: str
    root: str
    allow_changes: bool


@dataclass(frozen=True)
class ClusterSettings:
    requeue: str | None  # command that puts a job back into the queue; its number is appended
    grace: Above0 | None  # seconds between a signal and the end, where no SLURM tells them
    preflight: Above0  # seconds within which all nodes answer


@dataclass(frozen=True)
class CheckpointSettings:
    every: Duration
    keep: Positive  # the newest ones
    permanent: Duration | None  # those at multiples of it stay for good
    best: bool  # the one with the lowest validation loss stays
    background: bool  # written while training goes on, from a copy of the state in the host's memory


@dataclass(frozen=True)
class WatchdogSettings:
    """Of what ends a run that hangs; seconds but for the two factors."""

    enabled: bool
    factor: Annotated[
        float, Bound("at least 2", lambda x: x >= 2)
    ]  # of the median step: what a place of a step may take
    floor: Annotated[float, Bound("at least 5", lambda x: x >= 5)]  # what it may take in any case
    startup: Above0
    first_step: Above0
    checkpoint: Above0
    validation: Above0
    slow_factor: Annotated[float, Bound("above 1", lambda x: x > 1)]  # of the other ranks' work: a straggler's
    slow_steps: Positive  # in a row


@dataclass(frozen=True)
class ValidationSettings:
    every: Duration
    batches: Positive | None  # micro-batches of each validation; None: all of the held-out data
    context: Positive | None  # tokens of one window of held-out text; None: batch.context


Strategy = Literal[
    "auto",
    "ddp",
    "fsdp",
    "deepspeed_1",
    "deepspeed_2",
    "deepspeed_3",
    "deepspeed_1_offload",
    "deepspeed_2_offload",
    "deepspeed_3_offload",
]


Policy = Literal["skip", "rewind", "stop"]


@dataclass(frozen=True)
class StatisticsSettings:
    """The per-layer values and the other heavier ones of docs/metrics.md."""

    every: Duration


@dataclass(frozen=True)
class HealthSettings:
    """What a bad step costs: its update, a rewind behind the data it read, or the run."""

    nonfinite: Policy  # a loss or a gradient that is not finite
    spike: Literal["alert"] | Policy  # a loss far above those before it
    z: Above0  # robust z-score from which on a loss is a spike
    window: Annotated[int, Bound("at least 16", lambda n: n >= 16)]  # losses that it is compared with
    patience: Positive  # bad steps in a row that are skipped; then the run is rewound
    rewinds: NotNegative  # in all; then the run stops


@dataclass(frozen=True)
class SampleSettings:
    prompt: str
    tokens: NotNegative


@dataclass(frozen=True)
class Config:
    arch: str
    model: ModelSettings
    data: DataSettings
    vocab: VocabSettings
    batch: BatchSettings
    budget: BudgetSettings
    optim: OptimSettings
    strategy: Strategy
    deepspeed: str | None  # a JSON file that is merged over what is derived from the other settings
    trainer: TrainerSettings
    run: RunSettings
    cluster: ClusterSettings
    checkpoint: CheckpointSettings
    validation: ValidationSettings
    watchdog: WatchdogSettings
    statistics: StatisticsSettings
    health: HealthSettings
    samples: SampleSettings
    seed: NotNegative
    resume: str  # auto, never or a path
    init_weights: str | None = field(metadata={"word": "init.weights"})
    compile: bool
    activation_checkpointing: bool | Positive  # every block, or every n-th
    dry_run: bool
    profile: bool  # records a few steps with torch.profiler
    replay: str | None  # a file that a bad step has left: that step again, and nothing else
    device: str | None  # the card that plan and dry_run reckon with where none is present
    mfu: Annotated[float, Bound("above 0 and below 1", lambda x: 0 < x < 1)] | None  # what the plan reckons with
    threads: Positive | None  # CPU threads of one process; None: the cores divided by the processes of this machine
    packages: tuple[str, ...] = ()  # whose classes a _target_ may name, beside lightning's and ours
    logger: dict[str, Any] = field(default_factory=dict)  # name → a tree with _target_
    callbacks: dict[str, Any] = field(default_factory=dict)
    launcher: dict[str, Any] = field(default_factory=dict)  # of hydra-submitit-launcher; empty: the run begins here
    resume_typed: bool = field(default=False, metadata={"word": None})  # whether the command line says resume=
