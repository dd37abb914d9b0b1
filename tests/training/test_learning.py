"""The model learns: it overfits one batch, and the loss of the default run falls as known in its first sixty steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_train.cli import launcher
from rwkv_train.models import ModelConfig, build_model, recipe_of
from rwkv_train.training import module
from rwkv_train.training.loss import language_model_loss
from rwkv_train.training.optim import build_optimizer, learning_rate, parameter_groups
from rwkv_train.training.run import train
from tests.runs import overrides_for, rows


def test_one_batch_is_learned_by_heart() -> None:
    """256 random bytes, each of them 5.5 nats at first, to below 0.1: recipe, schedule and loss as in a run."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 256, (4, 65))
    model = build_model(ModelConfig("rwkv4", 2, 64, 256), seed=1)
    settings = replace(launcher.load([]).optim, lr=1e-2)
    optimizer = build_optimizer(parameter_groups(model, recipe_of(model), settings.weight_decay), settings)
    losses = []
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, 256 * step, 256 * 149, 256) * group["lr_multiplier"]
        logits, _ = model(tokens[:, :-1])
        loss = language_model_loss(logits, tokens[:, 1:], settings.l2wrap)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(256)) < 0.2
    assert losses[-1] < 0.1


# Cut short to sixty steps; a validation looks at 4 of its batches.
SIXTY_STEPS = [
    "budget.steps=60",
    "optim.schedule.warmup.steps=10",
    "validation.every.steps=20",
    "validation.batches=4",
    "samples.tokens=0",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
]


@pytest.mark.slow
def test_sixty_steps_of_the_default_run(tmp_path: Path) -> None:
    """Held-out loss on Python 3.11's library: 2.4 nats/byte untrained, 1.68 after 20 steps, 1.54 and 1.51 after 60."""
    assert train(launcher.load([*SIXTY_STEPS, f"run.root={tmp_path}", "run.name=run"])) == 0
    validated = [row for row in rows(tmp_path / "run") if "val/loss" in row]
    found = {row["step"]: row["val/bits_per_byte"] * math.log(2) for row in validated}
    assert list(found) == [20, 40, 60]
    assert found[20] < 1.8
    assert found[60] < found[40] < found[20] - 0.1
    assert found[60] < 1.6


def test_a_rate_of_the_wrong_sign_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A check of the test above: after a few steps uphill, the loss is above that of uniform predictions."""
    monkeypatch.setattr(module, "learning_rate", lambda *arguments: -learning_rate(*arguments))
    assert train(launcher.load(overrides_for(tmp_path, "run", "budget.steps=20"))) == 0
    assert not rows(tmp_path / "runs" / "run")[-1]["val/loss"] < math.log(256)
