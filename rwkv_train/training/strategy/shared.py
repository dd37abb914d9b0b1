"""What all strategies share: their state as shards, filled from the recipe or a checkpoint, saved to a checkpoint."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rwkv_train.checkpoint.shards import MOMENTS, Reader, StateShard, contents, file_names, index_of
from rwkv_train.checkpoint.storage import Storage
from rwkv_train.checkpoint.writer import InProcessStore, KeyValueStore, Writer
from rwkv_train.cluster.rendezvous import rendezvous
from rwkv_train.errors import UserError
from rwkv_train.models import LanguageModel
from rwkv_train.models.unused import freeze_unused
from rwkv_train.training.throughput import keep_freed_memory, return_freed_memory

_MAX_NAMES = 4  # of frozen parameters in a warning


class Source(Protocol):
    """Where the initial weights come from: the recipe, or a file."""

    def fill(self, shards: list[StateShard]) -> None:
        """Stores into each shard the values of its range; a collective call."""


@dataclass(frozen=True)
class GradientNorms:
    """The gradient norms of one step before clipping.

    Args:
        names: of the parameters that have a gradient, in the order of the model.
        values: (P) float32, the L2 norm of each one's gradient over all ranks.
    """

    names: tuple[str, ...]
    values: Tensor


class ShardedStrategy(Strategy):
    """A mix-in of Lightning's strategies: one checkpoint interface, whatever part of the state a rank holds.

    Attributes:
        source: of the initial weights; None: the model has them already.
        resume: the checkpoint to resume from; None: the run starts at step 0.
        attempt: the number of this attempt; that of rank 0 is used.
        shapes: of all parameters, by the field's names.
        threads: CPU threads of this process.
        writer: of checkpoints.
        background: whether a save copies the state, so that training continues while it is written.
    """

    source: Source | None = None
    resume: Path | None = None
    attempt: int = 0
    shapes: Mapping[str, tuple[int, ...]]
    threads: int
    writer: Writer
    background: bool = True
    divided = False  # whether all ranks own a part of the state
    sharded = False  # whether no rank holds all weights
    brings_precision = False  # whether Lightning's precision plugin is its own
    gradient_norms: GradientNorms | None = None  # of the last step; None: this strategy does not know them
    _copies: dict[tuple[str, str], Tensor]

    if TYPE_CHECKING:  # of all of Lightning's strategies, declared on none that they share

        @property
        def global_rank(self) -> int: ...

        @property
        def world_size(self) -> int: ...

    def setup_environment(self) -> None:
        """Lets the ranks find each other, within a limited time."""
        with rendezvous(self.world_size):
            self._find_ranks()

    def _find_ranks(self) -> None:
        super().setup_environment()

    def attach(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        source: Source | None,
        resume: Path | None,
        attempt: int,
        threads: int,
        background: bool,
    ) -> None:
        """Gives the strategy the run whose state it holds; must precede Lightning's setup.

        Args:
            shapes, source, resume, attempt, threads, background: see the attributes of the class.
        """
        self.shapes, self.source, self.resume = shapes, source, resume
        self.attempt, self.threads, self.background = attempt, threads, background

    def open_writer(self, storage: Storage, after_commit: Callable[[], None]) -> None:
        """Makes the writer of checkpoints, once the ranks know each other.

        Args:
            storage: the file system.
            after_commit: called in the writer's thread when a checkpoint is complete.
        """
        writers = self.world_size if self.divided else 1
        self.writer = Writer(storage, self.global_rank, writers, self.key_value_store(), after_commit)

    def begin_attempt(self, number: int) -> int:
        """Takes over the number of a new attempt from the first rank; all ranks call it."""
        self.attempt = self.broadcast(number)
        return self.attempt

    def materialise(self, model: LanguageModel) -> None:
        """Allocates this rank's share of a model on the meta device, without values."""
        torch.set_num_threads(self.threads)  # Lightning has just set another number
        if self.divided:  # before the first large tensor: later the freed memory would remain fragmented
            return_freed_memory()
        if self.sharded:
            _freeze(model)  # on the meta device: a sharded model cannot run outside of its strategy
        self._materialise(model)
        if not self.sharded:
            _freeze(model)

    @abstractmethod
    def _materialise(self, model: LanguageModel) -> None:
        """`materialise` of this strategy."""

    @abstractmethod
    def shards(self, moments: bool) -> Iterator[StateShard]:
        """This rank's share of the state: the weights of all parameters, and the moments of the trainable ones.

        Args:
            moments: whether the moments of Adam are included, and made where they do not exist yet.
        """

    @abstractmethod
    def states(self) -> Iterator[dict[str, Any]]:
        """The optimiser's state dicts that count Adam's steps."""

    def named_weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """All parameters under the field's names, frozen ones included."""
        assert self.lightning_module is not None
        yield from self.lightning_module.model.named_parameters()  # type: ignore[union-attr]

    def trainable_weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters that the optimiser changes, under the field's names."""
        for name, parameter in self.named_weights():
            if parameter.requires_grad:
                yield name, parameter

    def setup(self, trainer: Any) -> None:
        self._copies = {}
        super().setup(trainer)
        self._follow_first()
        if self.resume is not None:
            self.restore(self.resume)
        elif self.source is not None:
            self.source.fill(list(self.shards(moments=False)))
            self.filled()
        else:
            self.filled()
        for _ in self.shards(moments=True):
            pass  # makes Adam's moments now: if the first step made them, its freed memory would be fragmented
        # only now, so that the memory used for making the initial weights is returned
        (return_freed_memory if self.divided else keep_freed_memory)()

    def _follow_first(self) -> None:
        """Takes over the attempt and the checkpoint of rank 0, which alone has read the complete checkpoint.

        Raises:
            UserError: rank 0 found a checkpoint and this rank none, or the reverse.
        """
        self.attempt, resume = self.broadcast((self.attempt, None if self.resume is None else str(self.resume)))
        if (resume is None) != (self.resume is None):
            raise UserError(
                f"the ranks found different checkpoints to resume from: rank 0 {resume}, this rank {self.resume}",
                "start again; run.root=DIR must be the same directory for all ranks",
            )
        self.resume = None if resume is None else Path(resume)

    def restore(self, checkpoint: Path) -> None:
        """Replaces this rank's share of the state by that of a checkpoint, between two steps."""
        reader = Reader(checkpoint, verified=True)
        reader.fill(self.shards(moments=True))
        for state in self.states():
            step, now = state["step"], reader.meta.updates
            state["step"] = torch.full_like(step, now) if isinstance(step, Tensor) else now
        if self.global_rank < reader.meta.writers:
            torch.set_rng_state(reader.state(self.global_rank)["random_state"])
        self.filled()

    def teardown(self) -> None:
        """After a failure before `materialise` there are no values that Lightning could move to the host."""
        module = self.lightning_module
        if module is not None and any(parameter.is_meta for parameter in module.parameters()):
            self._lightning_module = None
        super().teardown()

    def filled(self) -> None:
        """Called when the weights have new values, to update copies of them that are no shards."""

    def clip(self, limit: float) -> Tensor | None:
        """Clips the norm of the gradient of all parameters and ranks.

        Returns:
            the norm () before clipping; None: the optimiser's step clips, and `norm_of_step` returns it afterwards.
        """
        found = {name: parameter for name, parameter in self.trainable_weights() if parameter.grad is not None}
        norms = torch._foreach_norm([p.grad for p in found.values() if p.grad is not None])
        self.gradient_norms = GradientNorms(tuple(found), self.gathered(torch.stack(norms)))
        norm: Tensor = torch.linalg.vector_norm(self.gradient_norms.values)
        torch.nn.utils.clip_grads_with_norm_(list(found.values()), limit, norm)
        return norm

    def norm_of_step(self) -> Tensor | None:
        """The gradient norm () before clipping, where `clip` does not know it; called after the optimiser's step."""
        return None

    def skip_update_if(self, bad: Tensor) -> None:
        """Makes the optimiser's next step change nothing if `bad` () is true, without reading it on the host."""
        for optimizer in self.optimizers:
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # read by fused optimisers

    def gathered(self, values: Tensor) -> Tensor:
        """The complete tensor where its parts are on several ranks; a collective call."""
        return values

    def full_value(self, parameter: Tensor) -> Tensor | None:
        """The complete value of a parameter between two steps, a collective call; None: it would cost too much."""
        return self.gathered(parameter.detach())

    def probe(self, batch: Any) -> Tensor:
        """The loss of a batch on this rank, without gradient."""
        loss: Tensor = self.lightning_module.probe(batch)  # type: ignore[operator, union-attr]
        return loss

    def key_value_store(self) -> KeyValueStore:
        """A key-value store of all ranks."""
        if self.world_size == 1:
            return InProcessStore()
        host = self.cluster_environment.main_address  # type: ignore[attr-defined]
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if self.global_rank == 0 else None
        port = self.broadcast(store.port if store is not None else 0)
        return store or TCPStore(host, port, is_master=False)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # weights and optimiser state are saved as shards

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing to do: `setup` has filled the shards."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        reader = Reader(self.resume or Path(checkpoint_path), verified=True)
        return {**reader.state(0)["lightning"], "state_dict": {}, "meta": reader.meta}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Begins a save; `writer` reports its outcome. Lightning's own dict is saved in the first state file."""
        self.settle()
        meta = checkpoint.pop("meta")
        files: dict[str, Any] = {}
        index = None
        if self.global_rank < self.writer.writers:
            weights, state = contents(self._held(), self.shapes)
            state["random_state"] = torch.get_rng_state()
            if self.global_rank == 0:
                state["lightning"] = checkpoint
            files = dict(zip(file_names(self.global_rank, self.writer.writers), (weights, state), strict=True))
            index = index_of(weights, state)
        self.writer.begin(Path(filepath), files, meta, index)
        if not self.background:
            self.writer.wait()

    def settle(self) -> None:
        """Returns when no rank is writing; raises where a rank has died."""
        while not self.reduce_boolean_decision(self.writer.idle, all=True):
            time.sleep(0.02)
        self.writer.wait()

    def updates(self) -> int:
        """Optimiser updates applied so far; fewer than steps where some were skipped."""
        # a parameter without a gradient in some step has counted fewer
        return int(torch.stack([torch.as_tensor(state["step"]) for state in self.states()]).max())

    def _held(self) -> Iterator[StateShard]:
        """The shards of this rank: copies on the host, in memory that each save reuses, or the state itself."""
        for shard in self.shards(moments=True):
            if not self.background or not shard.owned:
                yield shard
                continue
            key = (shard.kind, shard.name)
            if key not in self._copies:
                self._copies[key] = torch.empty(shard.values.numel(), pin_memory=shard.values.is_cuda)
            yield StateShard(shard.kind, shard.name, shard.start, self._copies[key].copy_(shard.values.detach()), True)


def _freeze(model: LanguageModel) -> None:
    """Freezes what no gradient reaches, and warns about it on rank 0."""
    if names := freeze_unused(model):
        shown = ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")
        rank_zero_warn(
            f"{len(names)} parameters get no gradient and are not trained: {shown}; "
            "set requires_grad=False, or name them in not_trained of the recipe, where that is intended"
        )


def adam_moments(state: dict[str, Any], like: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The two moments of a parameter's state in torch's AdamW, made where the optimiser has not made them yet."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=like.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(like, memory_format=torch.preserve_format)
    for moment in MOMENTS:
        yield moment, state[moment]
