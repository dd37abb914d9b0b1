"""Initial values, learning rates, weight decay and sizes of RWKV-7, each against the formula of the specification."""

from __future__ import annotations

import math

import pytest
import torch

from rwkv_train.cli.checks import Machine
from rwkv_train.cli.configure import config_builder
from rwkv_train.models import ModelConfig, build_model, recipe_of
from rwkv_train.planning.model import parameters
from rwkv_train.resources import resource
from rwkv_train.training.optim import parameter_groups

L, C, N, V = 3, 48, 16, 60
RANKS = {"decay_low_rank_dim": 8, "a_low_rank_dim": 12, "v_low_rank_dim": 4, "gate_low_rank_dim": 96}
CONFIG = ModelConfig("rwkv7", n_layer=L, n_embd=C, vocab_size=V, head_size=N, extra=RANKS)
WIDTH = dict(zip("wavg", RANKS.values(), strict=True))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return dict(build_model(CONFIG, seed=3).state_dict())


def test_names_are_the_fields(weights: dict[str, torch.Tensor]) -> None:
    shapes = {"emb.weight": (V, C), "head.weight": (V, C), "ln_out.weight": (C,), "ln_out.bias": (C,)}
    shapes |= {f"blocks.0.ln0.{part}": (C,) for part in ("weight", "bias")}
    for layer in range(L):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        shapes |= {f"blocks.{layer}.{norm}.{part}": (C,) for norm in ("ln1", "ln2") for part in ("weight", "bias")}
        shapes |= {f"{att}.ln_x.{part}": (C,) for part in ("weight", "bias")}
        shapes |= {f"{att}.{name}": (1, 1, C) for name in ("k_k", "k_a", "w0", "a0", "v0")}
        shapes |= {f"{att}.x_{name}": (1, 1, C) for name in "rwkvag"}
        shapes |= {f"{att}.{name}1": (C, width) for name, width in WIDTH.items()}
        shapes |= {f"{att}.{name}2": (width, C) for name, width in WIDTH.items()}
        shapes |= {f"{att}.r_k": (C // N, N), f"{ffn}.x_k": (1, 1, C)}
        shapes |= {f"{att}.{name}.weight": (C, C) for name in ("key", "value", "receptance", "output")}
        shapes |= {f"{ffn}.key.weight": (4 * C, C), f"{ffn}.value.weight": (C, 4 * C)}
    assert {name: tuple(value.shape) for name, value in weights.items()} == shapes
    assert len(weights) == 33 * L + 6
    counted = 2 * V * C + 4 * C + L * (19 * C + 12 * C * C + 2 * C * sum(WIDTH.values()))
    assert sum(value.numel() for value in weights.values()) == counted


def test_curves(weights: dict[str, torch.Tensor]) -> None:
    lin = [c / (C - 1) - 0.5 for c in range(C)]
    z = [((c % N) - (N - 1) / 2) / ((N - 1) / 2) for c in range(C)]
    zig = [x * abs(x) for x in z]
    for layer in range(L):
        rho0, rho1 = layer / (L - 1), 1 - layer / L
        expected = {
            **{f"att.x_{name}": [1 - (c / C) ** (0.2 * rho1) for c in range(C)] for name in "rg"},
            **{f"att.x_{name}": [1 - (c / C) ** (0.9 * rho1) for c in range(C)] for name in "wa"},
            **{f"att.x_{name}": [1 - (c / C) ** (0.7 * rho1) for c in range(C)] for name in "kv"},
            "ffn.x_k": [1 - (c / C) ** (rho1**4) for c in range(C)],
            "att.w0": [-6 + 6 * (c / (C - 1)) ** (1 + rho0**0.3) + 0.5 + 2.5 * zig[c] for c in range(C)],
            "att.a0": [-0.19 + 0.3 * zig[c] + 0.4 * lin[c] for c in range(C)],
            "att.v0": [0.73 - 0.4 * lin[c] for c in range(C)],
            "att.k_k": [0.71 - 0.1 * lin[c] for c in range(C)],
            "att.k_a": [1.02] * C,
            "att.r_k": [-0.04] * C,
            "att.ln_x.weight": [((1 + layer) / L) ** 0.7] * C,
            **{f"{norm}.weight": [1.0] * C for norm in ("ln1", "ln2")},
        }
        for name, values in expected.items():
            value = weights[f"blocks.{layer}.{name}"].flatten()
            assert (value.double() - torch.tensor(values, dtype=torch.float64)).abs().max() < 4e-7, name


def test_matrices(weights: dict[str, torch.Tensor]) -> None:
    gains = {"head.weight": 0.5 * math.sqrt(V / C)}
    for layer in range(L):
        att = f"blocks.{layer}.att"
        gains |= {f"{att}.receptance.weight": 1.0, f"{att}.value.weight": 1.0, f"{att}.key.weight": 0.1}
        gains |= {f"blocks.{layer}.ffn.key.weight": 1.0}
        gains |= {f"{att}.{name}2": 0.1 * math.sqrt(max(1.0, width / C)) for name, width in WIDTH.items()}
    for name, gain in gains.items():
        matrix = weights[name].double()
        gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
        assert (gram - gain**2 * torch.eye(len(gram), dtype=torch.float64)).abs().max() < 1e-5, name
    embedding = weights["emb.weight"]
    assert 0.9e-4 < embedding.abs().max() <= 1e-4
    zero = {name for name, value in weights.items() if not value.any()}
    expected = {name for name in weights if name.endswith(("output.weight", "ffn.value.weight", ".bias"))}
    expected |= {f"blocks.{layer}.att.{name}1" for layer in range(L) for name in "wavg"}
    assert zero == expected


def test_groups_name_by_name() -> None:
    model = build_model(CONFIG)
    seen = {}
    for group in parameter_groups(model, recipe_of(model), weight_decay=0.1):
        for name, _ in group["params"]:
            assert name not in seen
            seen[name] = (group["lr_multiplier"], group["weight_decay"])
    unused = {f"blocks.0.att.v{number}" for number in range(3)}
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == unused
    assert seen == {
        name: (
            2.0 if name.endswith(".w0") else 1.0,
            0.1 if name.endswith(".weight") and parameter.dim() == 2 else 0.0,
        )
        for name, parameter in model.named_parameters()
        if name not in unused
    }


# The released sizes: model=, the release's name, layers, channels, widths, parameters, learning rates of the Pile runs.
RELEASED = [
    ("169m", "0.1b", 12, 768, (64, 64, 32, 128), 191_084_544, (8e-4, 3e-5)),
    ("430m", "0.4b", 24, 1024, (64, 64, 32, 128), 450_834_432, (6e-4, 2e-5)),
    ("1b5", "1.5b", 24, 2048, (96, 96, 64, 256), 1_527_668_736, (5e-4, 1.5e-5)),
    ("3b", "2.9b", 32, 2560, (96, 96, 64, 320), 2_948_065_280, (0.45 / 2560, 0.04 / 2560)),
    ("7b", "7.2b", 32, 4096, (128, 128, 96, 480), 7_199_932_416, (0.45 / 4096, 0.04 / 4096)),
    ("14b", "13.3b", 61, 4096, (192, 192, 128, 384), 13_270_298_624, (0.45 / 4096, 0.04 / 4096)),
]


@pytest.mark.parametrize(("size", "release", "layers", "channels", "widths", "count", "rates"), RELEASED)
def test_released_sizes(
    size: str,
    release: str,
    layers: int,
    channels: int,
    widths: tuple[int, ...],
    count: int,
    rates: tuple[float, float],
) -> None:
    dry = ["arch=rwkv7", "model.vocab_size=65536", "dry_run=true", "run.name=one"]
    with config_builder([resource("conf")], Machine(cores=2)) as builder:
        config, other = builder.build([*dry, f"model={size}"]), builder.build([*dry, f"model={release}"])
    assert other == config
    model = config.model
    assert (model.n_layer, model.n_embd, tuple(model.extra[name] for name in RANKS)) == (layers, channels, widths)
    assert (config.optim.lr, config.optim.final_lr) == rates
    assert (config.optim.eps, config.optim.weight_decay, config.optim.betas) == (1e-18, 0.1, (0.9, 0.99))
    assert parameters(ModelConfig("rwkv7", layers, channels, 65536, extra=model.extra)) == count


@pytest.mark.parametrize(
    ("channels", "widths"), [(64, (32, 32, 32, 32)), (768, (64, 64, 32, 128)), (4096, (160, 160, 96, 320))]
)
def test_widths_of_other_shapes(channels: int, widths: tuple[int, ...]) -> None:
    config = build_model(ModelConfig("rwkv7", 1, channels, 9), device="meta").config
    assert (config.head_size, tuple(config.extra[name] for name in RANKS)) == (64, widths)
