"""Metrics: the keys of docs/metrics.md, values against plain arithmetic, and that no step waits for the device."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from rwkv_train.checkpoint.shards import WEIGHT, StateShard
from rwkv_train.cli import launcher
from rwkv_train.models import ModelConfig, build_model
from rwkv_train.models.rwkv4 import content
from rwkv_train.training.callbacks import metrics
from rwkv_train.training.module import RWKVModule
from rwkv_train.training.run import train
from rwkv_train.training.statistics import Statistics
from rwkv_train.training.throughput import AsyncHostCopy, Stopwatch, matmul_rate
from tests.runs import ROOT, overrides_for, rows, train_ranks

STATISTICS_EVERY = "statistics.every.steps=5"


def table() -> dict[str, str]:
    """Key → when it is there, from docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    return {m[1]: m[2] for m in re.finditer(r"^\| `([^`]+)` \| [^|]+ \| ([\w-]+) \|", text, re.MULTILINE)}


def check_table(run: Path, sources: list[str], missing: tuple[str, ...] = ()) -> None:
    """Every row has the keys that the documents name, and no other."""
    known = table()
    assert len(known) > 30
    for row in rows(run):
        due = (
            {"each"} | ({"n-th"} if row["step"] % 5 == 0 else set()) | ({"validation"} if "val/loss" in row else set())
        )
        wanted = {key for key, when in known.items() if when in due} - set(missing)
        for key in [key for key in wanted if key.endswith("/SOURCE")]:
            wanted.remove(key)
            wanted |= {key.replace("SOURCE", source) for source in sources} if len(sources) > 1 else set()
        found = {key for key in row if not (key.startswith("train/loss/") and "SOURCE" not in key)}
        assert found == {key for key in wanted if not key.startswith("train/loss/")}, row["step"]


@pytest.mark.parametrize("passes", [1, 2])
def test_the_documents_say_what_is_logged(tmp_path: Path, passes: int) -> None:
    overrides = overrides_for(
        tmp_path, "run", "budget.steps=10", "validation.every.steps=4", STATISTICS_EVERY, f"batch.micro={4 // passes}"
    )
    assert train(launcher.load(overrides)) == 0
    run = tmp_path / "runs" / "run"
    check_table(run, [""])
    for row in rows(run):
        assert row["train/bits_per_byte"] == pytest.approx(row["train/loss"] / math.log(2))
        assert row["grad_norm_clipped"] == pytest.approx(min(row["grad_norm"], 1.0), rel=1e-5)
        assert 0 <= row["clip_share"] <= 1
        assert 0 < row["goodput"] <= 1
        parts = sum(row[f"time/{part}"] for part in metrics.PARTS)
        assert 0 < parts <= row["seconds"] * 1.05 + 0.01
        assert row["tokens_per_second"] == pytest.approx(128 / row["seconds"], rel=1e-3)
    hours = [row["hours"] for row in rows(run)]
    assert hours == sorted(hours)


class Truth(Callback):
    """Recomputes the values of step n in plain arithmetic from the complete model and batch of one process."""

    found: ClassVar[dict[str, Any]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        model = pl_module.model
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            logits, state = model(batch[0])
        seen: list[Tensor] = []
        hooks = [block.att.receptance.register_forward_hook(lambda m, i, r: seen.append(r)) for block in model.blocks]
        with torch.no_grad():
            model(batch[0])
        for hook in hooks:
            hook.remove()
        contents = [content(layer.wkv) for layer in state.layers]
        self.values: dict[str, Any] = {
            "max_logit": logits.abs().max(),
            "layers/state_rms": torch.stack([each.square().mean().sqrt() for each in contents]),
            "layers/receptance_saturated": torch.stack(
                [((torch.sigmoid(r) < 0.02) | (torch.sigmoid(r) > 0.98)).float().mean() for r in seen]
            ),
        }

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step != 5:
            return
        parameters = dict(pl_module.model.named_parameters())
        update = sum((p - self.before[name]).square().sum() for name, p in parameters.items())
        weight = sum(value.square().sum() for value in self.before.values())
        self.values["update_ratio"] = (update / weight).sqrt()
        lives = [math.log(2) / block.att.time_decay.exp() for block in pl_module.model.blocks]
        self.values["decay/half_life"] = torch.stack(
            [life.quantile(torch.tensor([0, 0.1, 0.5, 0.9, 1])) for life in lives]
        )
        Truth.found = {key: value.tolist() for key, value in self.values.items()}


def close(one: Any, other: Any, rel: float) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(close(a, b, rel) for a, b in zip(one, other, strict=True))
    return bool(one == pytest.approx(other, rel=rel, abs=1e-7))


def test_against_plain_arithmetic(tmp_path: Path) -> None:
    overrides = [
        "packages=[tests]",
        "+callbacks.truth._target_=tests.training.test_metrics.Truth",
        "budget.steps=5",
        STATISTICS_EVERY,
    ]
    assert train(launcher.load(overrides_for(tmp_path, "run", *overrides))) == 0
    row = rows(tmp_path / "runs" / "run")[4]
    for key, value in Truth.found.items():
        assert close(row[key], value, 0.03 if key == "update_ratio" else 1e-4), (key, row[key], value)  # a sample
    norm = math.hypot(*row["layers/grad_norm"])
    assert norm <= row["grad_norm"]
    assert all(0 < ratio < 2 for ratio in row["layers/contribution"])


@pytest.mark.parametrize(
    "strategy",
    ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "deepspeed_2", "deepspeed_3"))],
)
def test_two_ranks_say_what_one_says(tmp_path: Path, strategy: str) -> None:
    """The same batch in two passes, or on two ranks in one each; whatever a rank holds of the model."""
    steps = ["budget.steps=5", STATISTICS_EVERY, "validation.every.steps=5", "validation.batches=3"]
    steps += ["validation.context=32"]
    assert train(launcher.load(overrides_for(tmp_path, "one", *steps, "batch.micro=2"))) == 0
    train_ranks(overrides_for(tmp_path, "two", *steps, "batch.micro=2", f"strategy={strategy}"), 2)
    one, two = (rows(tmp_path / "runs" / name) for name in ("one", "two"))
    zero = strategy.startswith("deepspeed")
    check_table(tmp_path / "runs" / "two", [""], ("layers/grad_norm",) if zero else ())
    assert "val/loss" in one[-1]
    for before, after in zip(one, two, strict=True):
        for key in before:
            if key.endswith("bits_per_byte") or key == "val/loss":
                assert close(after[key], before[key], 1e-5), (key, before[key], after[key])
            if key in ("train/loss", "grad_norm", "max_logit", "update_ratio") or key.startswith(("layers/", "decay/")):
                if key == "layers/grad_norm" and zero:
                    continue
                exact = key != "max_logit"  # of the first pass only
                assert not exact or close(after[key], before[key], 2e-3), (key, before[key], after[key])


def test_by_source(tmp_path: Path) -> None:
    """Weighted by their tokens, the losses of the sources are the loss of the step."""
    overrides = overrides_for(tmp_path, "run", "budget.steps=10", STATISTICS_EVERY)
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "a.txt").write_text(text[:12000])
    (tmp_path / "b.txt").write_text(text[12000:].upper())
    sources = f"data.sources=[{{name:a,path:{tmp_path}/a.txt,weight:1}},{{name:b,path:{tmp_path}/b.txt,weight:1}}]"
    mixed = [override for override in overrides if not override.startswith("data")]
    assert train(launcher.load([*mixed, "data=mixture", "data.tokenizer=bytes", sources])) == 0
    found = rows(tmp_path / "runs" / "run")
    check_table(tmp_path / "runs" / "run", ["a", "b"])
    for row, before in ((found[4], found[3]), (found[9], found[8])):
        tokens = {name: row[f"tokens/{name}"] - before[f"tokens/{name}"] for name in "ab"}
        whole = sum(row[f"train/loss/{name}"] * tokens[name] for name in "ab" if tokens[name]) / 128
        assert whole == pytest.approx(row["train/loss"], rel=1e-4)


WAITING_CALLS = ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "nonzero")


def test_no_step_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first step to the last no tensor's value is asked for, but of what has landed on the host."""
    asked: Counter[str] = Counter()
    inside = [False]
    landed: set[int] = set()
    flight = AsyncHostCopy.__init__

    def remember(self: Any, values: Any) -> None:
        flight(self, values)
        landed.add(id(self._host))

    monkeypatch.setattr(AsyncHostCopy, "__init__", remember)
    for name in WAITING_CALLS:
        plain = getattr(Tensor, name)

        def asks(self: Tensor, *args: Any, _plain: Any = plain, _name: str = name, **kwargs: Any) -> Any:
            if inside[0] and id(self) not in landed:
                asked[_name] += 1
            return _plain(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, asks)
    begin = RWKVModule.on_train_start

    def start(self: RWKVModule) -> None:
        inside[0] = True
        return begin(self)

    monkeypatch.setattr(RWKVModule, "on_train_start", start)
    last = metrics.Metrics.on_train_end

    def end(self: Any, *args: Any) -> None:  # then comes the last checkpoint, which waits
        inside[0] = False
        last(self, *args)

    monkeypatch.setattr(metrics.Metrics, "on_train_end", end)
    more = ["budget.steps=12", "statistics.every.steps=4", "batch.micro=2", "checkpoint.every.steps=1000"]
    overrides = overrides_for(
        tmp_path, "run", *more, "validation.every.steps=1000", "data.hold_out=0", "health.spike=skip"
    )
    assert train(launcher.load(overrides)) == 0
    assert len(rows(tmp_path / "runs" / "run")) == 12
    assert not asked, asked
    inside[0] = True
    landed.clear()  # a new tensor may have the id of a freed one
    float(torch.ones(1))
    assert asked, "the test itself must see a question"


def test_the_stopwatch() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for part in ("data", "forward", "", "forward"):
        watch.mark(part)
    marks = watch.lap()
    spent = watch.seconds(marks)
    assert set(spent) == {"data", "forward", ""}
    assert sum(spent.values()) == pytest.approx(marks[-1][1] - marks[0][1])
    assert len(watch.lap()) == 1


def test_a_rank_that_owns_nothing() -> None:
    """Of replicated weights only rank 0 owns the shards: the other ranks add zeros to the sums."""
    model = build_model(ModelConfig("rwkv4", n_layer=2, n_embd=8, vocab_size=16), seed=1)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def strategy_of(owned: bool) -> Any:
        found = [StateShard(WEIGHT, name, 0, p.detach().view(-1), owned) for name, p in model.named_parameters()]
        return SimpleNamespace(
            shards=lambda moments: iter(found),
            trainable_weights=model.named_parameters,
            shapes=shapes,
            root_device=torch.device("cpu"),
        )

    for owned in (True, False):
        statistics = Statistics(model, 1, hooks=False)
        strategy = strategy_of(owned)
        statistics.begin_step(1, strategy)
        with torch.no_grad():
            model.head.weight += 1.0
        update, weight = statistics._update(strategy)
        assert update.shape == weight.shape == (3,)
        assert update.tolist() == pytest.approx([0, 0, 128 if owned else 0])
        assert bool(weight[:2].sum() > 0) == owned


def test_every_event_is_in_the_docs() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "rwkv_train").rglob("*.py"))
    named = set(re.findall(r'(?:events\.add|self\._event)\(\s*"(\w+)"(?: if [^,]* else "(\w+)")?', sources))
    found = {name for pair in named for name in pair if name}
    assert {"started", "preempted", "straggler"} <= found
    text = (ROOT / "docs" / "metrics.md").read_text().split("## Events")[1].split("## ")[0]
    assert {name for name in found if f"`{name}`" not in text} == set()


def test_the_matmul_rate_is_measured_once_for_a_number_of_threads() -> None:
    rates = [matmul_rate(torch.device("cpu"), "bf16-mixed", threads) for threads in (1, 1, 2)]
    assert rates[0] == rates[1] != rates[2]
