"""Every setting as a field of a frozen dataclass, with its type and bounds.

To add a setting: a field here, and its default with a one-line description in conf/. schema.py derives everything else
(the name that is typed, reading, writing, durations, what a resume may change) from the types. What must hold between
several settings is checked in cli/checks.py. No torch here, so that errors are reported within a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

LOGITS_AT_ONCE = 2**24  # logits that the head and the loss process at a time at most (64 MiB in float32)
EVIDENCE_BYTES = 2**28  # bytes of recurrent state that statistics copy at a time at most

# Roles of a setting, as metadata of its field; a field of a settings class gives its role to all fields inside.
# Without a role, a setting defines the run: with another value it is another run, under another name.
PLACEMENT = {"role": "placement"}  # where and how the run is computed; a resume may change it
OPERATION = {"role": "operation"}  # how the run is stored, watched and shown; not part of its identity


@dataclass(frozen=True)
class Bound:
    """A condition on a number, beyond its type.

    Args:
        valid: the condition in words, such as "at least 1".
        holds: whether a number satisfies it.
    """

    valid: str
    holds: Callable[[float], bool]


Positive = Annotated[int, Bound("at least 1", lambda n: n >= 1)]
NotNegative = Annotated[int, Bound("at least 0", lambda n: n >= 0)]
Above0 = Annotated[float, Bound("above 0", lambda x: x > 0)]
From0 = Annotated[float, Bound("at least 0", lambda x: x >= 0)]
Share = Annotated[float, Bound("from 0 to 1", lambda x: 0 <= x <= 1)]
Fraction = Annotated[float, Bound("at least 0 and below 1", lambda x: 0 <= x < 1)]


@dataclass(frozen=True)
class Duration:
    """A length of training: a number of optimiser steps, or of tokens. Exactly one is given.

    On the command line it is two settings, NAME.steps and NAME.tokens.
    """

    steps: int | None = None
    tokens: int | None = None

    def in_steps(self, tokens_per_step: int) -> int:
        """The length in optimiser steps, rounded up."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // tokens_per_step)


PositiveDuration = Annotated[Duration, Bound("at least 1", lambda n: n >= 1)]  # the bound is that of the number


@dataclass(frozen=True)
class ModelSettings:
    size: str  # name of the file in conf/model
    n_layer: Positive  # number of blocks
    n_embd: Annotated[int, Bound("at least 2", lambda n: n >= 2)]  # channels; initial values divide by n_embd - 1
    dim_ffn: Positive | None  # channels inside the channel mix; None: the architecture's default
    vocab_size: Positive | None  # number of tokens; None: that of the tokenizer
    head_size: Positive | None = None  # channels of one head; None: the architecture's default, or it has no heads
    extra: dict[str, Positive] = field(default_factory=dict)  # further widths that the architecture knows, by name


@dataclass(frozen=True)
class SourceSettings:
    """One source of a mixture."""

    name: str
    path: str  # path of a store, a glob of stores, or a path of text
    weight: From0 | None  # share of the tokens, relative to the other sources; None: its number of tokens
    epochs: Above0 | None  # maximum number of passes over it; None: no limit


@dataclass(frozen=True)
class StageSettings:
    """A stage of a curriculum: the weights of a mixture from a number of tokens on."""

    tokens: Positive  # token counter at which the stage begins
    weights: dict[str, Any]  # source → weight; sources that are not named have weight 0


@dataclass(frozen=True)
class DataSettings:
    source: Literal["stdlib", "text", "store", "mixture", "chat", "stream"]
    path: str | None  # a file or directory; None: the standard library of the running Python
    tokenizer: str | None  # bytes, world or a tokenizer.json; None: the tokenizer of the store, or bytes
    hold_out: Fraction  # share held out for validation: files by a hash of their names; of a store the last documents
    order: Literal["shuffled", "reference"] = "shuffled"  # reference: RWKV-LM's permutation of the samples
    documents: Literal["stream", "packed"] = "stream"  # cut from a stream of tokens, or complete documents in a row
    reset: bool = False  # whether the state is reset at the start of each packed document
    sources: tuple[SourceSettings, ...] = ()  # of a mixture
    curriculum: tuple[StageSettings, ...] = ()  # of a mixture
    template: str | None = None  # YAML file with the chat template; None: that of RWKV World
    field: str = "text"  # column that holds the text of a streamed data set
    split: str = "train"  # part of a streamed data set
    held_out_documents: NotNegative = 100  # number of leading documents of a stream that are held out for validation
    workers: NotNegative = 1  # processes that tokenise a stream; 0: the training process does it
    max_bad_rows: Share = 0.01  # of chats and streams: share of unusable rows that is left out without an error


@dataclass(frozen=True)
class VocabSettings:
    extend: tuple[str, ...] = ()  # texts that become one token each, numbered after the tokenizer's own tokens


@dataclass(frozen=True)
class BatchSettings:
    tokens: Positive  # tokens of one optimiser step over all devices; gradient accumulation is derived from it
    context: Positive  # tokens of one sample
    micro: Positive | None = field(metadata=PLACEMENT)  # samples per device and pass; None: as many as fit


@dataclass(frozen=True)
class BudgetSettings:
    total: PositiveDuration | None = field(metadata={"name": "budget"})  # budget.steps= or budget.tokens=
    hours: Above0 | None  # wall-clock time of a start, after which it stops, to be resumed: docs/scaling.md


@dataclass(frozen=True)
class ScheduleSettings:
    shape: Literal["constant", "exponential", "cosine"]
    warmup: Duration  # linear, from 1 % of lr to lr
    hold: Duration  # constant at lr, between warm-up and decay


@dataclass(frozen=True)
class GroupRule:
    """An override of the recipe for the parameters whose names match a pattern."""

    pattern: str  # regular expression for the complete name
    lr: From0 | None  # multiplier of the learning rate; None: that of the recipe
    weight_decay: bool | None  # whether weight decay applies; None: as in the recipe


@dataclass(frozen=True)
class OptimSettings:
    lr: Above0  # learning rate after warm-up
    final_lr: From0  # learning rate at the end of the budget
    betas: tuple[Fraction, Fraction]
    eps: Above0
    weight_decay: From0  # decoupled, as in AdamW
    clip: Above0 | None  # maximum gradient norm; None: no clipping
    l2wrap: From0  # coefficient of the penalty on the largest logit of each position
    schedule: ScheduleSettings
    rules: tuple[GroupRule, ...] = ()


@dataclass(frozen=True)
class TrainerSettings:
    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = field(metadata=PLACEMENT)
    devices: Literal["auto"] | Positive = field(metadata=PLACEMENT)  # processes per node
    num_nodes: Literal["auto"] | Positive = field(metadata=PLACEMENT)  # auto: the nodes of the job
    precision: str  # auto, 32-true or bf16-mixed

    @property
    def node_count(self) -> int:
        """Number of nodes. In a job, auto is resolved before this is read; elsewhere it means one node."""
        return 1 if self.num_nodes == "auto" else self.num_nodes


@dataclass(frozen=True)
class RunSettings:
    name: str  # name of the run directory
    root: str  # directory that holds the run directories
    allow_changes: bool  # whether resume=auto continues although settings differ


@dataclass(frozen=True)
class ClusterSettings:
    requeue: str | None  # command that requeues a SLURM job; the job id is appended. None: jobs are not requeued
    grace: Above0 | None  # seconds between the stop signal and the kill, outside of SLURM; None: unknown
    preflight: Above0  # seconds within which all nodes must answer before the run begins


@dataclass(frozen=True)
class CheckpointSettings:
    every: PositiveDuration  # interval between two checkpoints
    keep: Positive  # number of newest checkpoints that are kept
    permanent: PositiveDuration | None  # checkpoints at multiples of this are never deleted
    best: bool  # whether each validation is followed by a checkpoint, and the one with the lowest loss is kept as well
    background: bool  # whether it is written while training continues, from a copy of the state in host memory


@dataclass(frozen=True)
class WatchdogSettings:
    """Limits of the process that ends a run that hangs, and the rule that reports stragglers."""

    enabled: bool
    factor: Annotated[float, Bound("at least 2", lambda x: x >= 2)]  # time limit of a phase, in mean step times
    floor: Annotated[float, Bound("at least 5", lambda x: x >= 5)]  # smallest time limit of a phase, in seconds
    startup: Above0  # seconds until the first step begins
    first_step: Above0  # seconds for each of the first steps, until there is a mean step time
    checkpoint: Above0  # seconds that training may wait for a checkpoint
    validation: Above0  # seconds for one batch of validation
    slow_factor: Annotated[float, Bound("above 1", lambda x: x > 1)]  # a straggler's compute time, relative to the rest
    slow_steps: Positive  # consecutive steps after which a straggler is reported


@dataclass(frozen=True)
class ValidationSettings:
    every: PositiveDuration  # interval between two validations
    batches: Positive | None  # global batches of held-out text, over all devices and sources; None: all of it
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
    """The expensive values of docs/metrics.md, such as those per layer."""

    every: PositiveDuration


@dataclass(frozen=True)
class HealthSettings:
    """What happens after a bad step: its update is skipped, the run is rewound past its data, or the run stops."""

    nonfinite: Policy  # for a loss or a gradient that is not finite
    spike: Literal["alert"] | Policy  # for a loss far above the previous ones
    z: Above0  # robust z-score above which a loss is a spike
    window: Annotated[int, Bound("at least 16", lambda n: n >= 16)]  # number of previous losses it is compared with
    patience: Positive  # consecutive bad steps that are skipped before the run is rewound
    rewinds: NotNegative  # rewinds in the complete run before it stops


@dataclass(frozen=True)
class SampleSettings:
    prompt: str  # text that the samples before and after training continue
    tokens: NotNegative  # length of a sample; 0: no samples


@dataclass(frozen=True)
class Config:
    """What the user asked for, checked. What `auto` and None become is decided when the run is set up."""

    arch: str
    model: ModelSettings
    data: DataSettings
    vocab: VocabSettings
    batch: BatchSettings
    budget: BudgetSettings
    optim: OptimSettings
    strategy: Strategy = field(metadata=PLACEMENT)
    deepspeed: str | None = field(metadata=PLACEMENT)  # a JSON file merged over the derived DeepSpeed configuration
    trainer: TrainerSettings
    run: RunSettings = field(metadata=OPERATION)
    cluster: ClusterSettings = field(metadata=OPERATION)
    checkpoint: CheckpointSettings = field(metadata=PLACEMENT)
    validation: ValidationSettings
    watchdog: WatchdogSettings = field(metadata=OPERATION)
    statistics: StatisticsSettings = field(metadata=OPERATION)
    health: HealthSettings = field(metadata=OPERATION)
    samples: SampleSettings
    seed: NotNegative
    resume: str = field(metadata=OPERATION)  # auto, never or the path of a checkpoint
    init_weights: str | None = field(metadata={"name": "init.weights"})
    compile: bool
    activation_checkpointing: bool | Positive = field(metadata=PLACEMENT)  # true: every block; n: every n-th block
    dry_run: bool = field(metadata=OPERATION)
    profile: bool = field(metadata=OPERATION)  # whether a few steps are recorded with torch.profiler
    replay: str | None = field(metadata=OPERATION)  # replay file of a bad step: repeat that step and nothing else
    device: str | None = field(metadata=OPERATION)  # the GPU that plan and dry_run assume; None: the one present
    mfu: Annotated[float, Bound("above 0 and below 1", lambda x: 0 < x < 1)] | None = field(
        metadata=OPERATION
    )  # model FLOPs utilisation that plan and dry_run assume; None: an estimate
    threads: Positive | None = field(metadata=PLACEMENT)  # CPU threads of one process; None: its share of the cores
    packages: tuple[str, ...] = ()  # packages whose classes a _target_ may name, beside lightning and rwkv_train
    # interpolations in these three stay as they are written, so that no record holds a secret: interpolation.py
    logger: dict[str, Any] = field(default_factory=dict, metadata=OPERATION)  # name → a tree with _target_
    callbacks: dict[str, Any] = field(default_factory=dict)  # name → a tree with _target_
    launcher: dict[str, Any] = field(default_factory=dict, metadata=OPERATION)  # settings of the SLURM job; {}: no job
    resume_typed: bool = field(default=False, metadata={"name": None})  # whether the command line has resume=
