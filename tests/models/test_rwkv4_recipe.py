"""Initial values, learning rates and weight decay of RWKV-4, each against the formula of the specification."""

import math

import pytest
import torch

from rwkv_train.config import GroupRule
from rwkv_train.errors import UserError
from rwkv_train.models import ModelConfig, build_model, recipe_of
from rwkv_train.models.recipe import Orthogonal, RecipeRow, Site, claim, constant, initial_value
from rwkv_train.training.optim import parameter_groups

L, C, V = 3, 24, 60
CONFIG = ModelConfig("rwkv4", n_layer=L, n_embd=C, vocab_size=V)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return dict(build_model(CONFIG, seed=3).state_dict())


def test_names_are_the_fields(weights: dict[str, torch.Tensor]) -> None:
    shapes = {"emb.weight": (V, C), "head.weight": (V, C), "ln_out.weight": (C,), "ln_out.bias": (C,)}
    shapes |= {f"blocks.0.ln0.{part}": (C,) for part in ("weight", "bias")}
    for layer in range(L):
        block = f"blocks.{layer}"
        shapes |= {f"{block}.{norm}.{part}": (C,) for norm in ("ln1", "ln2") for part in ("weight", "bias")}
        shapes |= {f"{block}.att.{name}": (C,) for name in ("time_decay", "time_first")}
        shapes |= {f"{block}.att.time_mix_{name}": (1, 1, C) for name in "kvr"}
        shapes |= {f"{block}.ffn.time_mix_{name}": (1, 1, C) for name in "kr"}
        shapes |= {f"{block}.att.{name}.weight": (C, C) for name in ("key", "value", "receptance", "output")}
        shapes |= {f"{block}.ffn.key.weight": (4 * C, C), f"{block}.ffn.receptance.weight": (C, C)}
        shapes |= {f"{block}.ffn.value.weight": (C, 4 * C)}
    assert {name: tuple(value.shape) for name, value in weights.items()} == shapes
    assert sum(value.numel() for value in weights.values()) == 2 * V * C + 13 * C * C * L + C * (11 * L + 4)


def test_curves(weights: dict[str, torch.Tensor]) -> None:
    for layer in range(L):
        rho0, rho1 = layer / (L - 1), 1 - layer / L
        expected = {
            "att.time_decay": [-5 + 8 * (c / (C - 1)) ** (0.7 + 1.3 * rho0) for c in range(C)],
            "att.time_first": [math.log(0.3) + 0.5 * ((c + 1) % 3 - 1) for c in range(C)],
            "att.time_mix_k": [(c / C) ** rho1 for c in range(C)],
            "att.time_mix_v": [(c / C) ** rho1 + 0.3 * rho0 for c in range(C)],
            "att.time_mix_r": [(c / C) ** (0.5 * rho1) for c in range(C)],
            "ffn.time_mix_k": [(c / C) ** rho1 for c in range(C)],
            "ffn.time_mix_r": [(c / C) ** rho1 for c in range(C)],
        }
        for name, values in expected.items():
            value = weights[f"blocks.{layer}.{name}"].flatten()
            assert (value.double() - torch.tensor(values, dtype=torch.float64)).abs().max() < 4e-7, name


def test_zeros_norms_and_embedding(weights: dict[str, torch.Tensor]) -> None:
    zero = ("att.key", "att.receptance", "att.output", "ffn.value", "ffn.receptance")
    for name, value in weights.items():
        if any(part in name for part in zero):
            assert not value.any(), name
        if ".ln" in name or name.startswith("ln_out"):
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
    embedding = weights["emb.weight"]
    assert embedding.abs().max() <= 1e-4
    assert embedding.std().item() == pytest.approx(1e-4 / math.sqrt(3), rel=0.05)  # a uniform distribution's
    assert abs(embedding.mean().item()) < 5e-6


@pytest.mark.parametrize("vocab_size", [60, 10])
def test_orthogonal(vocab_size: int) -> None:
    weights = build_model(ModelConfig("rwkv4", L, C, vocab_size), seed=1).state_dict()
    gains = {"head.weight": 0.5 * math.sqrt(vocab_size / C) if vocab_size > C else 0.5}
    gains |= {f"blocks.{layer}.att.value.weight": 1.0 for layer in range(L)}
    gains |= {f"blocks.{layer}.ffn.key.weight": 2.0 for layer in range(L)}  # sqrt(4 C / C)
    for name, gain in gains.items():
        matrix = weights[name].double()
        gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
        assert (gram - gain**2 * torch.eye(len(gram), dtype=torch.float64)).abs().max() < 1e-5, name


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (65536, 8)])
def test_orthogonal_values_are_torch_s(shape: tuple[int, int]) -> None:
    found = Orthogonal(0.5, tall_factor=True)(torch.Size(shape), Site(0, 1), torch.Generator().manual_seed(1))
    gain = 0.5 * math.sqrt(max(1.0, shape[0] / shape[1]))
    wanted = torch.nn.init.orthogonal_(torch.empty(shape), gain, torch.Generator().manual_seed(1))
    assert torch.equal(found, wanted)
    assert found.is_contiguous()


def test_a_single_layer_has_ratio_zero() -> None:
    weights = build_model(ModelConfig("rwkv4", 1, C, V)).state_dict()
    assert torch.isfinite(weights["blocks.0.att.time_decay"]).all()
    assert weights["blocks.0.att.time_mix_v"].max() < 1


def test_a_value_depends_on_seed_name_and_shape_only(weights: dict[str, torch.Tensor]) -> None:
    model = build_model(CONFIG, seed=3)
    rows = recipe_of(model)
    threads = torch.get_num_threads()
    for name in reversed(list(weights)):  # another order, after other draws, with another number of threads
        torch.manual_seed(len(name))
        torch.set_num_threads(1 + len(name) % 2)
        assert torch.equal(initial_value(name, weights[name].shape, rows[name], CONFIG, 3), weights[name]), name
    torch.set_num_threads(threads)
    other = build_model(CONFIG, seed=4).state_dict()
    assert not torch.equal(other["head.weight"], weights["head.weight"])
    assert not torch.equal(weights["blocks.0.ffn.key.weight"], weights["blocks.1.ffn.key.weight"])


def test_each_parameter_is_claimed_once() -> None:
    row = RecipeRow("a", constant(0))
    with pytest.raises(ValueError, match=r"parameter b must be claimed by exactly one row.*none"):
        claim(["a", "b"], [row])
    with pytest.raises(ValueError, match=r"parameter a must be claimed"):
        claim(["a"], [row, RecipeRow(".*", constant(0))])
    with pytest.raises(ValueError, match="match no parameter: idle"):
        claim(["a"], [row, RecipeRow("idle", constant(0))])


def expected_group(name: str, weight_decay: float) -> tuple[float, float]:
    """The specification in other words: ×2 decay, ×3 bonus; weight decay on matrices that are no time_* vector."""
    multiplier = 2.0 if name.endswith("time_decay") else 3.0 if name.endswith("time_first") else 1.0
    matrix = name.endswith(".weight") and "ln" not in name
    return multiplier, weight_decay if matrix else 0.0


def test_groups_name_by_name() -> None:
    model = build_model(CONFIG)
    groups = parameter_groups(model, recipe_of(model), weight_decay=0.1)
    seen = {}
    for group in groups:
        for name, parameter in group["params"]:
            assert name not in seen
            seen[name] = (group["lr_multiplier"], group["weight_decay"])
            assert parameter is model.get_parameter(name)
    assert seen == {name: expected_group(name, 0.1) for name, _ in model.named_parameters()}


def test_rules_override_and_must_match() -> None:
    model = build_model(CONFIG)
    rules = (GroupRule(r".*time_decay", 5.0, None), GroupRule(r"emb\.weight", None, False))
    groups = parameter_groups(model, recipe_of(model), 0.1, rules)
    where = {name: group for group in groups for name, _ in group["params"]}
    assert where["blocks.1.att.time_decay"]["lr_multiplier"] == 5.0
    assert where["emb.weight"]["weight_decay"] == 0.0
    assert where["head.weight"]["weight_decay"] == 0.1
    with pytest.raises(UserError, match="time_dekay"):
        parameter_groups(model, recipe_of(model), 0.1, (GroupRule(".*time_dekay", 2.0, None),))
