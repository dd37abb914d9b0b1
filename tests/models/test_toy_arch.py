"""A second architecture, added by the list of CONTRIBUTING, works with everything that depends on models."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rwkv_train.checkpoint.shards import WEIGHT, StateShard
from rwkv_train.cli.checks import Machine
from rwkv_train.cli.configure import ConfigBuilder, config_builder
from rwkv_train.config.mesh import Mesh
from rwkv_train.errors import UserError, UserErrors
from rwkv_train.evaluation.report.charts import layer_charts_of
from rwkv_train.inference.generate import generate
from rwkv_train.inference.loading import load_model
from rwkv_train.models import ARCHITECTURES, LanguageModel, ModelConfig, build_model
from rwkv_train.models.detect import detect
from rwkv_train.models.weights import shapes_of
from rwkv_train.planning.memory import Layout, memory
from rwkv_train.planning.model import count
from rwkv_train.resources import resource
from rwkv_train.training.statistics import Statistics
from tests.toy_arch import REGISTRATION

SHAPE = ModelConfig("toy", n_layer=3, n_embd=32, vocab_size=50, head_size=4)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "toy", REGISTRATION)


@pytest.fixture
def model() -> LanguageModel:
    model = build_model(SHAPE, seed=1)
    with torch.no_grad():
        model.emb.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def text(batch: int, length: int) -> torch.Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(length))


def test_shapes_and_initial_values(model: LanguageModel) -> None:
    decay = model.get_parameter("blocks.1.att.decay")
    assert decay.shape == (8, 4)
    assert decay.flatten().tolist() == pytest.approx([-5 + 8 * c / 31 for c in range(32)])
    assert model.config.dim_ffn == 128
    assert build_model(ModelConfig("toy", 1, 32, 9)).config.head_size == 8
    for shape in (ModelConfig("toy", 1, 32, 9, head_size=5), ModelConfig("toy", 1, 36, 9)):
        with pytest.raises(ValueError, match=f"n_embd is {shape.n_embd}; it must be a multiple of head_size"):
            build_model(shape)


def test_parallel_is_recurrent_and_documents_know_nothing_of_each_other(model: LanguageModel) -> None:
    tokens = text(2, 20)
    whole, end = model(tokens)
    state, logits = model.empty_state(2), []
    for t in range(20):
        one, state = model(tokens[:, t : t + 1], state)
        logits.append(one)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(state.tensors(), end.tensors(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    starts = torch.zeros(2, 20, dtype=torch.bool)
    starts[:, 7] = True
    torch.testing.assert_close(model(tokens, starts=starts)[0][:, 7:], model(tokens[:, 7:])[0], rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_get_the_values_of_the_first_one(model: LanguageModel) -> None:
    other = copy.deepcopy(model)
    other.activation_checkpointing = 1
    tokens = text(2, 17)
    for network in (model, other):
        F.cross_entropy(network(tokens)[0].flatten(0, 1), tokens.flatten()).backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        if name == "blocks.0.att.first":
            assert one.grad is None
            assert two.grad is None
        else:
            assert one.grad is not None, name
            assert two.grad is not None, name
            assert torch.equal(one.grad, two.grad), name
    gradient = model.get_parameter("blocks.1.att.first").grad
    assert gradient is not None
    assert gradient.any()


class OneDevice:
    """What Statistics asks of a strategy, for a model on one device."""

    root_device = torch.device("cpu")
    gradient_norms = None

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.shapes = model, shapes_of(dict(model.named_parameters()))

    def trainable_weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.model.named_parameters()

    def shards(self, moments: bool) -> Iterator[StateShard]:
        for name, parameter in self.model.named_parameters():
            yield StateShard(WEIGHT, name, 0, parameter.detach().view(-1), True)

    def full_value(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach()


def test_statistics_are_the_architecture_s(model: LanguageModel) -> None:
    statistics, strategy = Statistics(model, every=1), OneDevice(model)
    statistics.begin_step(1, strategy)  # type: ignore[arg-type]
    states = []
    for length in (9, 12):
        _, state = model(text(2, length))
        statistics.record_microbatch(state)
        states.append(state)
    found: dict[str, Any] = statistics.layer_values(strategy)  # type: ignore[arg-type]
    assert set(found) > {"layers/state_rms", "layers/active", "decay/half_life", "layers/contribution"}
    assert "layers/receptance_saturated" not in found
    squares = [
        sum((s.layers[layer].wkv[:, 0] / s.layers[layer].wkv[:, 1]).square().mean() for s in states) / 2
        for layer in range(3)
    ]
    torch.testing.assert_close(found["layers/state_rms"], torch.stack(squares).sqrt())
    lives = math.log(2) / model.get_parameter("blocks.2.att.decay").detach().exp().flatten()
    assert found["decay/half_life"][2].tolist() == pytest.approx(
        [float(lives.quantile(q)) for q in (0, 0.1, 0.5, 0.9, 1)]
    )
    assert all(s.finite(at_once=1).shape == (1, 3, 2) and bool(s.finite(at_once=1).all()) for s in states)
    states[0].layers[1].wkv[1, 0, 5] = math.nan
    assert (~states[0].finite(at_once=1)).nonzero().tolist() == [[0, 1, 1]]
    assert torch.equal(states[0].finite(at_once=1), states[0].finite(at_once=2**20))


def test_a_plan_counts_it() -> None:
    counts = count(SHAPE, "32-true")
    assert counts.parameters == sum(p.numel() for p in build_model(SHAPE, device="meta").parameters())
    assert counts.flops_per_token(20) == 6 * (3 * (3 * 32 * 32 + 2 * 32 * 128) + 50 * 32)
    assert counts.state_bytes == 3 * 3 * 32 * 4
    assert memory(counts, Layout("ddp", Mesh(2, 1), 4, 16, 1, 0, False)).device > 0


def test_its_files_are_recognised_and_generate(model: LanguageModel, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "toy.pth")
    assert detect(shapes_of(model.state_dict())) == model.config
    loaded = load_model(tmp_path / "toy.pth")
    assert loaded.config == model.config
    drawn = [list(generate(network.eval(), [1, 2, 3], 12, seed=4)) for network in (model, loaded)]
    assert drawn[0] == drawn[1]


def test_its_charts_are_known() -> None:
    assert layer_charts_of(["layers/active", "layers/grad_norm"])["layers/active"][0] == "Active channels"


@pytest.fixture
def conf(tmp_path: Path) -> Iterator[ConfigBuilder]:
    (tmp_path / "conf" / "arch").mkdir(parents=True)
    (tmp_path / "conf" / "model").mkdir()
    (tmp_path / "conf" / "arch" / "toy.yaml").write_text(
        "# @package _global_\narch: toy\n"
        "optim: {eps: 1.0e-18, weight_decay: 0.1, betas: [0.8, 0.9], schedule: {warmup: {tokens: 5000}}}\n"
    )
    (tmp_path / "conf" / "model" / "mini.yaml").write_text(
        "size: mini\npublished:\n  toy: {n_layer: 3, n_embd: 32, head_size: 4, lr: 1.0e-3, final_lr: 1.0e-4, "
        "weight_decay: 0.2, schedule: {shape: constant}}\n"
    )
    (tmp_path / "conf" / "optim").mkdir()
    (tmp_path / "conf" / "optim" / "mine.yaml").write_text("defaults: [adam]\neps: 1.0e-5\nweight_decay: 0.4\n")
    (tmp_path / "conf" / "experiment").mkdir()
    (tmp_path / "conf" / "experiment" / "try.yaml").write_text(
        "# @package _global_\noptim: {weight_decay: 0.3, schedule: {warmup: {steps: 7}}}\n"
    )
    with config_builder([resource("conf"), tmp_path / "conf"], Machine(cores=2)) as made:
        yield made


def test_precedence_of_constants(conf: ConfigBuilder) -> None:
    """optim < arch < the size's row < experiment < command line."""
    plain = conf.build([]).optim
    assert (plain.eps, plain.weight_decay, plain.schedule.warmup.steps) == (1e-18, 0.1, 50)
    toy = conf.build(["arch=toy", "model=mini"])
    assert (toy.optim.eps, toy.optim.betas, toy.optim.clip) == (1e-18, (0.8, 0.9), 1.0)  # arch, arch, optim
    assert (toy.optim.weight_decay, toy.optim.schedule.shape) == (0.2, "constant")  # the row
    assert (toy.optim.schedule.warmup.tokens, toy.optim.schedule.warmup.steps) == (5000, None)
    assert (toy.model.head_size, toy.model.n_layer) == (4, 3)
    tried = conf.build(["arch=toy", "model=mini", "experiment=try"]).optim
    assert (tried.eps, tried.weight_decay) == (1e-18, 0.3)
    assert (tried.schedule.warmup.steps, tried.schedule.warmup.tokens) == (7, None)
    typed = conf.build(["arch=toy", "model=mini", "experiment=try", "optim.weight_decay=0", "optim.eps=1e-9"]).optim
    assert (typed.eps, typed.weight_decay) == (1e-9, 0.0)
    chosen = conf.build(["arch=toy", "model=mini", "optim=mine"]).optim
    assert (chosen.eps, chosen.weight_decay, chosen.betas) == (1e-5, 0.4, (0.8, 0.9))
    assert conf.build(["arch=toy", "model=mini", "optim=mine", "experiment=try"]).optim.weight_decay == 0.3


def problems_of(conf: ConfigBuilder, *overrides: str) -> list[UserError]:
    with pytest.raises(UserErrors) as caught:
        conf.build(list(overrides))
    return caught.value.problems


def test_widths_that_an_arch_does_not_know_are_refused(conf: ConfigBuilder) -> None:
    (problem,) = problems_of(conf, "arch=rwkv4", "model.head_size=64")
    assert problem.what == "model.head_size=64: arch=rwkv4 has no such width"
    (problem,) = problems_of(conf, "arch=toy", "model=mini", "model.extra.rank=8")
    assert problem.what == "model.extra.rank=8: arch=toy has no such width"
    assert problem.remedy == "valid: head_size"
    with pytest.raises(ValueError, match="arch rwkv4 has no rank, head_size"):
        build_model(ModelConfig("rwkv4", 1, 8, 9, head_size=4, extra={"rank": 2}))


def test_weights_decide_about_the_arch(conf: ConfigBuilder, tmp_path: Path) -> None:
    path = tmp_path / "toy.pth"
    torch.save(build_model(replace(SHAPE, vocab_size=256)).state_dict(), path)
    config = conf.build(["data.tokenizer=bytes", f"init.weights={path}"])
    assert (config.arch, config.model.size, config.model.head_size) == ("toy", "mini", 4)
    assert config.optim.eps == 1e-18, "the arch's constants come with it"
    (problem,) = problems_of(conf, "data.tokenizer=bytes", f"init.weights={path}", "arch=rwkv4")
    assert problem.what == f"arch=rwkv4, but init.weights={path} is toy"
