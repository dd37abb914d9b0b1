"""Batches: what is in them, and that nothing is lost or doubled between steps, ranks and a resume."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from rwkv_train.config import BatchSettings, DataSettings
from rwkv_train.config.mesh import Mesh
from rwkv_train.data.batch import Batch
from rwkv_train.data.batches import Batches
from rwkv_train.data.datamodule import DataModule
from rwkv_train.data.rows import IGNORED_TARGET
from rwkv_train.errors import UserError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """3,000 bytes in 30 files, no two pieces of four bytes alike, nearly."""
    noise = np.random.default_rng(0)
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_bytes(noise.integers(1, 256, 100, dtype=np.uint8).tobytes())
    return tmp_path


def module(corpus: Path, tokens: int = 64, context: int = 8, micro: int | None = None, **more: Any) -> Batches:
    data = DataSettings(source="text", path=str(corpus), tokenizer="bytes", hold_out=0.2)
    return Batches(data, BatchSettings(tokens=tokens, context=context, micro=micro), seed=1, **more)


def test_a_batch_is_tokens_and_what_follows_each(corpus: Path) -> None:
    data = module(corpus)
    tokens, targets, *_ = data.batch(3)
    assert tokens.shape == targets.shape == (8, 8)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.is_contiguous()
    assert targets.is_contiguous()
    stream = data.train.tokens.tobytes()
    for row, following in zip(tokens, targets, strict=True):
        window = bytes([*row.tolist(), int(following[-1])])
        assert window in stream
        assert bytes(following.tolist()) == window[1:]


def test_an_epoch_reads_every_window_once(corpus: Path) -> None:
    data = module(corpus, tokens=8)
    epoch = [bytes(data.batch(step)[0][0].tolist()) for step in range(data.order.windows)]
    assert len(set(epoch)) == len(epoch)
    assert len(epoch) * 8 > len(data.train) - 16


def test_the_loader_starts_at_start_step(corpus: Path) -> None:
    whole = module(corpus, micro=2)
    assert (whole.micro, whole.accumulation) == (2, 4)
    resumed = module(corpus, micro=2)
    resumed.start_step = 77
    batches = list(islice(whole.training(), 90 * 4))
    for number, batch in enumerate(islice(resumed.training(), 13 * 4)):
        expected = batches[77 * 4 + number]
        assert torch.equal(batch[0], expected[0])
        assert torch.equal(batch[1], expected[1])
        assert torch.equal(batch[0], whole.batch(77 + number // 4, number % 4)[0])


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, None), (2, 2), (4, 1), (8, None)])
def test_a_step_is_the_same_whatever_the_ranks(corpus: Path, ranks: int, micro: int | None) -> None:
    alone = module(corpus).batch(5)[0]
    data = module(corpus, micro=micro, mesh=Mesh(ranks))
    rows = []
    for index in range(data.accumulation):
        for rank in range(ranks):
            data.rank = rank
            rows.append(data.batch(5, index)[0])
    assert torch.equal(torch.cat(rows), alone)


@pytest.mark.parametrize("context", [1, 7, 8, 100, 5_000])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_predicts_every_held_out_token_once(corpus: Path, context: int, ranks: int) -> None:
    if context == 5_000:  # the held-out text is shorter than one window, the training text is not
        (corpus / "more.txt").write_bytes(b"x" * 8_000)
    data = module(corpus, tokens=6 * context, context=context, mesh=Mesh(ranks))
    predicted, batches = [], set()
    for rank in range(ranks):
        data.rank = rank
        loader = data.validation()
        batches.add((len(loader), len(list(loader))))
        for number, (tokens, targets, *_) in enumerate(loader):
            assert tokens.shape == targets.shape
            assert int(tokens.min()) >= 0
            rows = zip(tokens, targets, strict=True)
            predicted += [((number, rank, row), *pair) for row, pair in enumerate(rows)]
    assert len({count for pair in batches for count in pair}) == 1, "every rank has as many batches"
    text = []
    for _, tokens, targets in sorted(predicted, key=lambda item: item[0]):
        real = targets != IGNORED_TARGET
        assert torch.equal(tokens[1:][real[1:]], targets[:-1][real[1:]])
        text += targets[real].tolist()
    assert bytes(text) == data.held_out.tokens.tobytes()[1:]
    assert data.held_out.tokens[0] == data.tokenizer.end_of_text


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_has_the_numbers_of_its_samples(corpus: Path, ranks: int) -> None:
    data = module(corpus, micro=2, mesh=Mesh(ranks))
    alone = module(corpus).batch(5)
    found: dict[int, torch.Tensor] = {}
    for rank in range(ranks):
        data.rank = rank
        data.start_step = 5
        for batch in islice(data.training(), data.accumulation):
            found.update(zip(batch.samples.tolist(), batch.tokens, strict=True))
            assert batch.sources.tolist() == [0, 0]
    assert sorted(found) == alone.samples.tolist() == list(range(data.split.samples))
    assert all(torch.equal(found[number], row) for number, row in zip(alone.samples, alone.tokens, strict=True))


def test_lightning_moves_a_batch_as_what_it_is(corpus: Path) -> None:
    """Its type, its numbers on the host and what is None stay."""
    batch = module(corpus).batch(0)
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, Batch)
    assert (moved.tokens.device.type, moved.targets.device.type) == ("meta", "meta")
    assert moved.samples is batch.samples
    assert moved.starts is moved.predictions is None


def test_a_limited_validation_is_spread_over_the_text(corpus: Path) -> None:
    whole = list(module(corpus, tokens=16).validation())
    few = list(module(corpus, tokens=16, validation_batches=3).validation())
    numbers = [next(n for n, batch in enumerate(whole) if torch.equal(batch[0], one[0])) for one in few]
    assert numbers == [0, len(whole) // 3, 2 * len(whole) // 3]
    assert len(module(corpus, tokens=16, validation_batches=10_000).validation()) == len(whole)


def test_without_held_out_text_there_is_no_validation(corpus: Path) -> None:
    data = DataSettings(source="text", path=str(corpus), tokenizer="bytes", hold_out=0.0)
    assert len(Batches(data, BatchSettings(64, 8, None), seed=1).validation()) == 0


def test_eighteen_short_samples_train(tmp_path: Path) -> None:
    for number in range(18):
        (tmp_path / f"{number}.txt").write_bytes(b"question? answer!\n")
    data = module(tmp_path, tokens=512, context=128)
    tokens, *_ = data.batch(1_000)
    assert tokens.shape == (4, 128)


def test_less_text_than_one_sample_names_found_and_needed(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_bytes(b"a few words\n" * 2)
    with pytest.raises(UserError, match=r"the training data has \d+ tokens; one sample of batch\.context=64 needs 65"):
        module(tmp_path, context=64)


def test_what_a_vocabulary_must_hold(corpus: Path) -> None:
    data = module(corpus)
    assert (data.vocab_size, data.largest_token) == (256, 255)
    for file in corpus.iterdir():
        file.write_bytes(b"plain text")
    assert module(corpus).largest_token == ord("x")


def test_what_a_run_says_of_its_data(corpus: Path) -> None:
    data = module(corpus)
    assert data.token_bytes.tolist() == [1] * 256
    assert f"{corpus}: 30 files, 3,000 bytes, hash {data.digest}; held out: " in data.description


def test_the_trainer_says_which_rank_this_is(corpus: Path) -> None:
    data = DataModule(module(corpus, mesh=Mesh(4)))
    device = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(world_size=4, global_rank=3, strategy=device)  # type: ignore[assignment]
    data.setup("fit")
    assert data.batches.rank == 3


class RecordingModule(L.LightningModule):
    """Trains nothing, and writes down what comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []
        self.predicted = 0

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch[0])
        return self.weight * 1.0

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self.predicted += int((batch[1] != IGNORED_TARGET).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(tmp_path: Path, data: Batches, **more: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=5,
        accumulate_grad_batches=data.accumulation,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **more,
    )


def test_lightning_takes_the_batches_as_they_are(corpus: Path, tmp_path: Path) -> None:
    data, counts = module(corpus, micro=4), RecordingModule()
    data.start_step = 2
    trainer(tmp_path, data, val_check_interval=5 * data.accumulation).fit(counts, datamodule=DataModule(data))
    expected = [data.batch(step, index)[0] for step in range(2, 7) for index in range(2)]
    assert torch.equal(torch.cat(counts.seen), torch.cat(expected))
    assert counts.predicted == len(data.held_out) - 1


def test_another_number_of_ranks_than_the_data_was_split_for_is_refused(corpus: Path, tmp_path: Path) -> None:
    data = module(corpus, mesh=Mesh(2))
    with pytest.raises(RuntimeError, match="the trainer has 1 ranks, the data was split for 2"):
        trainer(tmp_path, data).fit(RecordingModule(), datamodule=DataModule(data))
