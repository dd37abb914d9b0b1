"""The plan: its counts are the model's, its formulas match what each strategy shards, its advice fits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rwkv_train.cli import launcher
from rwkv_train.cli import main as cli
from rwkv_train.config import Config
from rwkv_train.config.mesh import Mesh
from rwkv_train.errors import UserError
from rwkv_train.models import ModelConfig, build_model
from rwkv_train.planning.cards import CARDS, card_of, find_card
from rwkv_train.planning.memory import Layout, activations, memory
from rwkv_train.planning.model import count
from rwkv_train.planning.plan import Plan, divisors, make_plan, smallest_change, why
from rwkv_train.planning.speed import traffic
from tests.exact import variation
from tests.oracles.models import small_shape

PLAN_7B = [
    "arch=rwkv4",
    "model=7b",
    "batch.context=4096",
    "batch.tokens=1048576",
    "batch.micro=2",
    "trainer.precision=bf16-mixed",
]
PLAN_7B_ON_8 = [*PLAN_7B, "trainer.devices=8", "model.vocab_size=50277", "dry_run=true"]


def plan(*overrides: str, card: str = "h100-80g", ranks: int = 8) -> tuple[Config, Plan]:
    config = launcher.load([*PLAN_7B_ON_8, *overrides])
    return config, make_plan(config, CARDS[card], Mesh(ranks), 256)


@pytest.mark.parametrize(("layers", "channels", "vocab_size"), [(1, 32, 64), (3, 96, 300)])
def test_counts_are_those_of_the_model_and_of_torchs_flop_counter(
    arch: str, layers: int, channels: int, vocab_size: int
) -> None:
    shape = small_shape(arch, layers, channels, vocab_size)
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    model, counts = build_model(shape), count(shape, "32-true")
    with FlopCounterMode(display=False) as counter:
        model(tokens)[0].sum().backward()
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    assert counts.flops_per_token(tokens.shape[1]) * tokens.numel() == counter.get_total_flops()


def test_what_autograd_keeps_is_what_the_plan_says(arch: str) -> None:
    """Bytes that the forward pass of a real model keeps, by autograd's own hooks."""
    shape, length = small_shape(arch, 3, 64, 32), 160
    model, found = build_model(shape), {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(1, length, dtype=torch.int64), readout=lambda hidden, weight: hidden)
    counts = count(shape, "32-true")
    planned = length * (3 * counts.block_saved + counts.ends_saved) + 3 * counts.block_casts
    assert planned == pytest.approx(sum(storage.nbytes() for storage in found.values()), rel=0.01)


def test_each_stage_shares_out_more() -> None:
    counts = count(ModelConfig("rwkv4", 32, 4096, 50277), "bf16-mixed")
    layout = Layout("ddp", Mesh(8), 1, 4096, 1, 0, True)
    names = ("ddp", "deepspeed_1", "deepspeed_2", "deepspeed_3")
    needs = [memory(counts, replace(layout, strategy=name)) for name in names]
    whole = 4 * counts.parameters
    assert [need.optimiser for need in needs] == [2 * whole] + [3 * whole / 8] * 3
    assert [need.weights for need in needs] == [whole, whole, whole, whole / 8]
    held = [need.device for need in needs]
    assert held == sorted(held, reverse=True)
    offloaded = memory(counts, replace(layout, strategy="deepspeed_3_offload"))
    assert (offloaded.weights, offloaded.optimiser) == (0, 0)
    assert offloaded.host > needs[3].host
    recomputed = activations(counts, replace(layout, checkpointing=1))
    assert recomputed < activations(counts, replace(layout, checkpointing=4)) < activations(counts, layout)


def test_parameters_that_are_not_trained_have_no_gradients_and_no_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, layout = ModelConfig("rwkv4", 2, 64, 256), Layout("ddp", Mesh(4), 1, 16, 1, 0, False)
    variation.install(monkeypatch)
    counts = count.__wrapped__(shape, "32-true")  # past its cache, which knows the shape as RWKV-4
    trainable = counts.parameters - (256 * 64 + 2 * 64) - 64  # embedding and decays; a vector that nothing reads
    assert counts.trainable == trainable
    for name, share in (("ddp", 1), ("fsdp", 4)):
        needs = memory(counts, replace(layout, strategy=name))
        assert needs.weights == 4 * counts.parameters / share
        assert (needs.gradients, needs.optimiser) == (4 * trainable / share, 8 * trainable / share)
        assert needs.checkpoint == 4 * counts.parameters + 8 * trainable
    assert traffic(counts, layout) == 2 * 4 * trainable * 3 / 4


def test_on_cpus_the_height_of_a_step_is_what_is_held_at_once() -> None:
    """Gradients fill their pages while activations go, and gloo's copy of all weights is made when both are gone."""
    counts = count(ModelConfig("rwkv4", 4, 64, 256), "32-true")
    whole, layout = 4 * counts.parameters, Layout("deepspeed_2", Mesh(2), 1, 16, 1, 0, False)
    needs = memory(counts, layout, gpu=False)
    assert needs.device == pytest.approx(needs.weights + needs.optimiser + whole + needs.runtime)
    long = replace(layout, context=4096)
    needs = memory(counts, long, gpu=False)
    kept = needs.activations + needs.logits + needs.statistics
    assert kept > 2 * whole
    assert needs.device == pytest.approx(needs.weights + needs.optimiser + kept + needs.runtime)
    passes = memory(counts, replace(long, accumulation=2), gpu=False)
    assert passes.device > needs.device + passes.gradients
    card, cpu = (memory(counts, replace(layout, strategy="deepspeed_3"), gpu) for gpu in (True, False))
    assert cpu.buffers == card.buffers + 4 * counts.block
    assert (card.apart, cpu.apart) == (0, 0)


def test_what_goes_over_the_network() -> None:
    """ZeRO's paper: 2 volumes of the model up to stage 2, 3 in stage 3; and again in each pass of accumulation."""
    counts = count(ModelConfig("rwkv4", 2, 64, 256), "32-true")
    layout, whole = Layout("ddp", Mesh(4), 1, 64, 1, 0, False), 4 * counts.parameters * 3 / 4
    sent = {name: traffic(counts, replace(layout, strategy=name)) / whole for name in ("ddp", "deepspeed_2", "fsdp")}
    assert sent == {"ddp": 2, "deepspeed_2": 2, "fsdp": 3}
    assert traffic(counts, replace(layout, strategy="deepspeed_3", accumulation=2)) / whole == 6
    assert traffic(counts, replace(layout, strategy="ddp", accumulation=2)) / whole == 2
    mixed = {n: traffic(counts, replace(layout, strategy=n, mixed=True)) / whole for n in ("fsdp", "deepspeed_3")}
    assert mixed == {"fsdp": 2, "deepspeed_3": 3}  # FSDP2 gathers in bfloat16; all sums of gradients are in float32


@pytest.mark.parametrize("overrides", [(), ("batch.micro=16",), ("strategy=ddp",), ("strategy=fsdp", "batch.micro=16")])
def test_the_advice_fits(overrides: Sequence[str]) -> None:
    """With the settings that the plan advises added to the command, the run fits."""
    card = "a100-40g"
    config, found = plan(*overrides, card=card)
    if found.fits:
        return
    change = smallest_change(config, found, 256)
    assert change is not None
    typed = {override.split("=")[0] for override in change[0].split()}
    kept = [override for override in [*PLAN_7B_ON_8, *overrides] if override.split("=")[0] not in typed]
    config = launcher.load([*kept, *change[0].split()])
    ranks = int(config.trainer.devices) * int(config.trainer.num_nodes)
    assert make_plan(config, CARDS[card], Mesh(ranks), 256).fits


def test_auto_takes_the_first_that_fits() -> None:
    assert plan(card="h200-141g")[1].layout.strategy == "deepspeed_2"
    assert plan("activation_checkpointing=true", "model=169m")[1].layout.strategy == "ddp"
    assert plan("activation_checkpointing=true", card="a100-40g")[1].layout.strategy == "deepspeed_3"


def test_a_micro_batch_that_is_not_given_is_the_largest_that_fits() -> None:
    overrides = [override for override in PLAN_7B_ON_8 if not override.startswith("batch.micro")]
    found = make_plan(launcher.load(overrides), CARDS["h100-80g"], Mesh(8), 256)
    assert (found.fits, found.layout.micro * found.layout.accumulation) == (True, 1048576 // 4096 // 8)
    given = [f"strategy={found.layout.strategy}", f"batch.micro={2 * found.layout.micro}"]
    assert not make_plan(launcher.load([*overrides, *given]), CARDS["h100-80g"], Mesh(8), 256).fits
    assert f"in {found.layout.accumulation} passes a step" in why(found)


def test_passes_are_any_divisor_of_the_samples_of_a_device() -> None:
    """RWKV-7's batch: 360 samples, 45 for each of 8 devices, of which none fits at once."""
    sized = ["arch=rwkv7", "model=7b", "trainer.devices=8", "trainer.precision=bf16-mixed", "dry_run=true"]
    config = launcher.load([*sized, "model.vocab_size=65536"])
    found = make_plan(config, CARDS["h100-80g"], Mesh(8), 65536)
    assert found.fits
    assert (found.layout.micro, found.layout.accumulation) == (1, 45)
    assert divisors(45) == [1, 3, 5, 9, 15, 45]


def test_what_the_readme_begins_with(capsys: pytest.CaptureFixture[str]) -> None:
    """`model=7b trainer.devices=8`, and nothing else, is a run that fits its cards."""
    assert cli.main(["plan", "model=7b", "trainer.devices=8", "device=h100-80g"]) == 0
    printed = capsys.readouterr().out
    assert "rwkv7 7b: L32 C4096" in printed
    assert "context 4096 × micro-batch 1 × 8 devices × 45 passes" in printed
    assert "\nfits  " in printed


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model=7b", "trainer.devices=8"], True),
        (["model=7b", "trainer.devices=8", "vocab.extend=[a]"], True),
        (["model=7b", "trainer.devices=8", "model.vocab_size=65536"], False),
        (["model=tiny", "trainer.devices=1"], False),
    ],
)
def test_a_published_size_with_a_small_vocabulary_is_named(
    overrides: list[str], named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.plan([*overrides, "device=h200-141g"]) in (0, 1)
    assert ("is a small vocabulary; published models of this size have" in capsys.readouterr().out) == named


def test_the_papers_model_has_the_papers_parameters(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    config = launcher.load(["experiment=paper_169m", f"data.path={tmp_path}", "dry_run=true", "device=h100-80g"])
    found = make_plan(config, CARDS["h100-80g"], Mesh(8), 256)
    assert (found.counts.shape.vocab_size, found.counts.parameters) == (50277, 169_342_464)


def test_a_stated_mfu_is_the_plans() -> None:
    assert plan("mfu=0.25")[1].speed.mfu == pytest.approx(0.25)


def test_cards() -> None:
    with pytest.raises(UserError, match="device=h999: there is no such card\n  valid: a100-40g"):
        find_card("h999")
    assert card_of(launcher.load([*PLAN_7B_ON_8, "device=a100-40g"])) == (CARDS["a100-40g"], "a100-40g (device=)")
    card, origin = card_of(launcher.load([*PLAN_7B_ON_8, "trainer.accelerator=cpu"]))
    assert (card.name, origin) == ("cpu", "this machine's CPU (trainer.accelerator=cpu)")


@pytest.mark.parametrize(
    ("name", "gigabytes", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", 85, "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", 42, "a100-40g"),
        ("NVIDIA H100 80GB HBM3", 85, "h100-80g"),
        ("NVIDIA GeForce RTX 4090", 25, "rtx4090-24g"),
        ("Another 9000", 50, "Another 9000"),
    ],
)
def test_the_card_that_is_present(monkeypatch: pytest.MonkeyPatch, name: str, gigabytes: int, card: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = SimpleNamespace(name=name, total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: found)
    present, origin = card_of(launcher.load(PLAN_7B_ON_8))
    assert (present.name, present.memory, present.per_machine) == (card, gigabytes * 10**9, 4)
    assert origin == f"{card} (the one present)"


def test_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "arch=rwkv4",
        "model=7b",
        "trainer.devices=8",
        "batch.tokens=1048576",
        "batch.context=4096",
        "batch.micro=2",
    ]
    overrides += ["budget.tokens=332e9", "model.vocab_size=50277"]
    assert cli.main(["plan", *overrides, "device=a100-80g"]) == 0
    printed = capfd.readouterr().out
    for part in (
        "passes, bf16-mixed",
        "device  a100-80g (device=)",
        "7,392,649,216 parameters",
        "fits ",
        "days",
        "sent a step by each",
    ):
        assert part in printed
    assert cli.main(["plan", *overrides, "device=a100-40g", "strategy=ddp"]) == 1
    printed = capfd.readouterr().out
    assert "does not fit" in printed
    assert "this fits: " in printed
    assert cli.main(["plan", "--json", *overrides]) == 0
    figures = json.loads(capfd.readouterr().out)
    assert figures["parameters"] == 7_392_649_216
    assert figures["fits"]
    assert figures["checkpoint_bytes"] == 12 * figures["parameters"]
    assert cli.main(["plan", "modle=7b"]) == 2
    assert "nearest: model" in capfd.readouterr().err
