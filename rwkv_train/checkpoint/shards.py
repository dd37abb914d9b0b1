"""State shards: the common form of every strategy's part of the state, and how shards are written and read.

A shard is a contiguous range of one flattened tensor: the weight of a parameter or one of Adam's two moments. ZeRO,
FSDP2 and replicated strategies differ only in which ranges a rank holds. Each rank writes the ranges that it owns
without communication, and reads the ranges that it needs, whichever rank wrote them: resuming with another number of
processes or another strategy needs no special case.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_train.checkpoint.directory import read_meta
from rwkv_train.checkpoint.meta import META, CheckpointMeta
from rwkv_train.checkpoint.name import find_weights
from rwkv_train.checkpoint.storage import INDEX, MANIFEST
from rwkv_train.errors import UserError
from rwkv_train.json_files import load_object
from rwkv_train.models.fitting import fit
from rwkv_train.models.weights import load_mapped, load_weights, shapes_of

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
ROWS_PER_READ = 4096  # rows of an embedding that are read at a time
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StateShard:
    """Elements [start, start + numel) of a flattened tensor, as this rank holds them.

    Args:
        kind: "weight", "exp_avg" or "exp_avg_sq".
        name: name of the parameter.
        start: index of the first element in the flattened tensor.
        values: (numel), on any device.
        owned: whether this rank writes it; each element is in exactly one owned shard of all ranks.
        put: stores new values; None: `values` is the parameter's own memory.
    """

    kind: str
    name: str
    start: int
    values: Tensor
    owned: bool
    put: Callable[[Tensor], None] | None = None

    def store(self, values: Tensor) -> None:
        """Replaces the values by new ones (numel)."""
        if self.put is None:
            self.values.copy_(values)
        else:
            self.put(values)


def file_names(number: int, of: int) -> tuple[str, str]:
    """Names of the weights file and the state file that writer `number` of `of` writes."""
    part = "" if of == 1 else f"_{number:04d}_of_{of:04d}"
    return f"weights{part}.pth", f"state{part}.pth"


def _refuse_other_files(path: Path, writers: int) -> None:
    """Refuses a checkpoint whose manifest does not name exactly the files that its writers make.

    Raises:
        UserError: naming the first one.
    """
    required = {META, *(name for number in range(writers) for name in file_names(number, writers))}
    try:
        listed = set(load_object(path / MANIFEST)["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / MANIFEST} cannot be read ({error!r:.200})", "use another checkpoint") from None
    if missing := sorted(required - listed):
        what = f"lacks {missing[0]}, one of the {len(required)} files of a checkpoint of {writers} writers"
    elif others := sorted(listed - required - {INDEX}):
        what = f"names {others[0]!r:.100}, which is no file of a checkpoint of {writers} writers"
    else:
        return
    raise UserError(f"{path / MANIFEST} {what}", "use another checkpoint, or copy this one again")


def contents(shards: Iterable[StateShard], shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """A rank's owned shards as the contents of its two files; nothing is copied.

    Returns:
        weights, name → tensor; and state: each moment's tensors by name, and in `starts` the first element of those
        tensors that are flattened parts.
    """
    weights: dict[str, Any] = {}
    state: dict[str, Any] = {"exp_avg": {}, "exp_avg_sq": {}, "starts": {}}
    for shard in shards:
        if not shard.owned or not shard.values.numel():
            continue
        shape, values = torch.Size(shapes[shard.name]), shard.values
        if values.numel() == shape.numel():
            values = values.view(shape)
        else:
            state["starts"][shard.name] = shard.start
        (weights if shard.kind == WEIGHT else state[shard.kind])[shard.name] = values
    return weights, state


def index_of(weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, Any]:
    """What `contents` has put into a rank's files: kind → name → [first element, number of elements]."""
    held = {WEIGHT: weights, **{moment: state[moment] for moment in MOMENTS}}
    starts = state["starts"]
    return {kind: {name: [starts.get(name, 0), t.numel()] for name, t in held[kind].items()} for kind in held}


@dataclass(frozen=True)
class _Part:
    """Elements [start, start + count) of a flattened tensor in a file.

    Attributes:
        load: returns them flattened, and whether they are mapped; opens the file where it is not open yet.
    """

    start: int
    count: int
    load: Callable[[], tuple[Tensor, bool]]


class Reader:
    """Reads ranges from a checkpoint, or from a .pth file with weights, through memory maps: never loads all of it.

    Where the checkpoint has an index, only the files with the wanted ranges are opened: as many ranks read as have
    written, and each opens its own.

    Args:
        path: a checkpoint directory, a .pth or .safetensors file, or a run directory (see `find_weights`).
        verified: whether the presence and the sizes of the checkpoint's files need no check, as rank 0 has done it.
        finite: whether weights that are not finite are refused when they are read.

    Attributes:
        shapes: of the tensors by name: in a file of others those of our model, where they have the same elements.
        note: what was removed from the names in a file and which unused tensors it lacks, for a line of output; empty:
            nothing.

    Raises:
        UserError: the path does not exist, or a file of the checkpoint is missing.
    """

    def __init__(self, path: Path, verified: bool = False, finite: bool = False) -> None:
        self.path, self._finite, self.note = find_weights(path), finite, ""
        path = self.path
        self._parts: dict[tuple[str, str], list[_Part]] = {}
        self._open: dict[str, dict[str, Any]] = {}  # files by name
        if path.is_dir():
            self.meta = CheckpointMeta.read(path) if verified else read_meta(path)
            _refuse_other_files(path, self.meta.writers)
            self.shapes: Shapes = self.meta.shapes
            for kind, name, number, start, count in self._index():
                part = _Part(start, count, partial(self._load, kind, name, number, count))
                self._parts.setdefault((kind, name), []).append(part)
        else:
            self._add_file(path)

    def _add_file(self, path: Path) -> None:
        """Adds the weights of a .pth or .safetensors file, and the unused tensors that it lacks."""
        alone = load_weights(path)
        dtype = next((value.dtype for value in alone.tensors.values()), torch.float32)
        fitted = fit(shapes_of(alone.tensors), dtype, str(path))
        notes = [note for note in (alone.note, fitted.note) if note]
        self.note, self.shapes = f"{path}: {'; '.join(notes)}" if notes else "", fitted.shapes
        for name, values in alone.tensors.items():
            self._add(name, values, 0, alone.mapped)
        for name, values in fitted.filled.items():
            self._add(name, values, 0, mapped=False)

    def _index(self) -> Iterator[tuple[str, str, int, int, int]]:
        """Which part of which tensor is in the files of which writer: (kind, name, writer, first element, count)."""
        writers = range(self.meta.writers)
        if (self.path / INDEX).exists():
            try:
                index = load_object(self.path / INDEX)
                for kind, names in index.items():
                    for name, parts in names.items():
                        for number, start, count in parts:
                            if any(type(n) is not int or n < 0 for n in (number, start, count)):
                                raise ValueError(f"a part of {name} is not three counts")
                            yield kind, name, writers[number], start, count
            except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
                raise UserError(
                    f"{self.path / INDEX} cannot be read ({error!r:.200})", "use another checkpoint"
                ) from None
            return
        for number in writers:
            for kind, names in index_of(self._weights(number), self.state(number)).items():
                for name, (start, count) in names.items():
                    yield kind, name, number, start, count

    def _file(self, name: str) -> dict[str, Any]:
        if name not in self._open:
            self._open[name] = _mapped(self.path / name)
            if not _is_content(self._open[name], name.startswith("state")):
                raise UserError(f"{self.path / name} does not hold what a checkpoint does", "use another checkpoint")
        return self._open[name]

    def _weights(self, number: int) -> dict[str, Any]:
        return self._file(file_names(number, self.meta.writers)[0])

    def state(self, number: int) -> dict[str, Any]:
        """The content of a writer's state file."""
        return self._file(file_names(number, self.meta.writers)[1])

    def _load(self, kind: str, name: str, number: int, count: int) -> tuple[Tensor, bool]:
        held = (self._weights(number) if kind == WEIGHT else self.state(number)[kind]).get(name)
        if held is None or held.numel() != count:
            raise UserError(
                f"the checkpoint {self.path} has another index than files: {name} ({kind})", "use another one"
            )
        return held.flatten(), held.is_contiguous()

    def _add(self, name: str, values: Tensor, start: int, mapped: bool) -> None:
        """Adds weights.

        Args:
            name: of the parameter.
            values: the whole parameter, or rows of it.
            start: number of their first element in it.
            mapped: whether their memory is a mapped file, whose pages can be dropped and read again.
        """
        flat = values.flatten(), mapped and values.is_contiguous()  # else `flatten` copies
        self._parts.setdefault((WEIGHT, name), []).append(_Part(start, values.numel(), lambda: flat))

    def grow_vocabulary(self, new: int) -> None:
        """Appends the weights of `new` tokens; the logits of the existing ones do not change.

        A new token starts as the mean of the existing ones, in the embedding and in the head.
        """
        for name in ("emb.weight", "head.weight"):
            if not new or len(self.shapes.get(name, ())) != 2:
                continue
            rows, channels = self.shapes[name]
            total, dtype = torch.zeros(channels, dtype=torch.float64), self.dtype(name)
            for row in range(0, rows, ROWS_PER_READ):
                count = min(ROWS_PER_READ, rows - row)
                part = torch.empty(count * channels, dtype=dtype)
                for offset, values in self.read(WEIGHT, name, row * channels, count * channels):
                    part[offset : offset + values.numel()].copy_(values)
                total += part.view(count, channels).double().sum(0)
            mean = (total / rows).to(dtype).expand(new, channels)
            self._add(name, mean.contiguous(), rows * channels, mapped=False)
            self.shapes = {**self.shapes, name: (rows + new, channels)}

    def holds(self, kind: str) -> bool:
        return any(held == kind for held, _ in self._parts)

    def read(self, kind: str, name: str, start: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """The range [start, start + count) as (offset in it, values) parts; copy each part before asking for the next.

        Raises:
            UserError: some elements are in no file.
        """
        found, end, twice = 0, 0, False
        for held in sorted(self._parts.get((kind, name), ()), key=lambda part: part.start):
            first, last = max(start, held.start), min(start + count, held.start + held.count)
            if first < last:
                values, mapped = held.load()
                part = values[first - held.start : last - held.start]
                if self._finite and kind == WEIGHT and not (good := torch.isfinite(part)).all():
                    raise UserError(
                        f"{self.path}: {name} has {int((~good).sum())} values that are not finite",
                        "give the weights of an earlier step, or copy the file again",
                    )
                yield first - start, part
                found += max(0, last - max(first, end))  # elements that two parts hold count once
                twice = twice or first < end
                end = max(end, last)
                if mapped:
                    _forget_pages(part)
        if count and kind in MOMENTS and (kind, name) not in self._parts:
            raise UserError(
                f"the checkpoint {self.path} has no optimiser state of {name}: it was not trained when it was written",
                f"leave it frozen, or start a new run from the weights: run.name=NEW init.weights={self.path}",
            )
        if found < count:
            raise UserError(
                f"the checkpoint {self.path} lacks {count - found} of {count} elements of {name} ({kind})",
                "use another checkpoint",
            )

        if twice:
            raise UserError(
                f"the checkpoint {self.path} has elements of {name} ({kind}) twice", "use another checkpoint"
            )

    def dtype(self, name: str) -> torch.dtype:
        return self._parts[(WEIGHT, name)][0].load()[0].dtype

    def copy_to(self, name: str, target: Tensor) -> None:
        """Copies a complete weight into a flat tensor that is mapped to a file, and releases the mapped pages."""
        for offset, values in self.read(WEIGHT, name, 0, target.numel()):
            target[offset : offset + values.numel()].copy_(values)
        _forget_pages(target)

    def fill(self, shards: Iterable[StateShard]) -> None:
        """Stores into each shard the values of its range.

        Raises:
            UserError: some elements are in no file or in two, or are not finite where they must be.
        """
        for shard in shards:
            count = shard.values.numel()
            complete = shard.values if shard.put is None else torch.empty(count)
            for offset, values in self.read(shard.kind, shard.name, shard.start, count):
                complete[offset : offset + values.numel()].copy_(values)
            if shard.put is not None:
                shard.put(complete)


def _mapped(path: Path) -> Any:
    try:
        return load_mapped(path)
    except FileNotFoundError:
        raise UserError(f"the checkpoint {path.parent} lacks {path.name}", "use another checkpoint") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}", "use another checkpoint") from None


def _is_content(held: Any, of_state: bool) -> bool:
    """Whether the content of a file is that of `contents`."""
    if not isinstance(held, dict):
        return False
    if not of_state:
        return all(isinstance(value, Tensor) for value in held.values())
    parts = [held.get(moment) for moment in MOMENTS]
    starts = held.get("starts")
    return (
        all(isinstance(part, dict) and all(isinstance(t, Tensor) for t in part.values()) for part in parts)
        and isinstance(starts, dict)
        and all(type(start) is int and start >= 0 for start in starts.values())
    )


def _forget_pages(values: Tensor) -> None:
    """Lets the kernel drop pages of a mapped file that were read; else they count as this process's memory.

    Of any other memory the kernel would drop the only copy: its next reader finds zeros.
    """
    page = mmap.PAGESIZE
    first = -(-values.data_ptr() // page) * page
    last = (values.data_ptr() + values.numel() * values.element_size()) // page * page
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 4)  # MADV_DONTNEED
