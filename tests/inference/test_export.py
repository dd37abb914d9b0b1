"""Export of checkpoints of any number of writers: the weights are unchanged in every format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rwkv_train.checkpoint.shards import MOMENTS, WEIGHT, StateShard, contents, file_names
from rwkv_train.checkpoint.storage import LocalStorage
from rwkv_train.checkpoint.writer import InProcessStore, Writer
from rwkv_train.cli.main import main as cli
from rwkv_train.inference.export import TRANSFORMERS, export
from rwkv_train.models import LanguageModel, ModelConfig, build_model
from rwkv_train.models.weights import shapes_of
from tests.checkpoint.metas import meta_of

SHAPE = ModelConfig("rwkv4", 2, 64, 96)


def lively(shape: ModelConfig = SHAPE) -> LanguageModel:
    """A model none of whose matrices is zero."""
    model, generator = build_model(shape), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def checkpoint_of(model: LanguageModel, folder: Path, writers: int) -> Path:
    path, board, shapes = folder / "step_000000001-0001", InProcessStore(), shapes_of(dict(model.named_parameters()))
    for rank in reversed(range(writers)):
        shards = []
        for name, parameter in model.named_parameters():
            numel = parameter.numel()
            first, last = rank * numel // writers, (rank + 1) * numel // writers
            values = parameter.detach().flatten()[first:last]
            shards += [StateShard(kind, name, first, values, True) for kind in (WEIGHT, *MOMENTS)]
        files = dict(zip(file_names(rank, writers), contents(shards, shapes), strict=True))
        meta = meta_of(shapes=shapes, writers=writers)
        writer = Writer(LocalStorage(), rank, writers, board)
        writer.begin(path, files, meta)
        writer.wait()
    return path


@pytest.mark.parametrize("writers", [1, 3])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_file(tmp_path: Path, writers: int, ending: str) -> None:
    model = lively()
    target = tmp_path / "deep" / f"out.{ending}"
    assert cli(["export", str(checkpoint_of(model, tmp_path, writers)), str(target)]) == 0
    weights = torch.load(target, weights_only=True) if ending == "pth" else load_file(target)
    wanted = model.state_dict()
    assert list(weights) == list(wanted) or ending == "safetensors"
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_another_dtype(tmp_path: Path) -> None:
    model = lively()
    target = export(checkpoint_of(model, tmp_path, 2), tmp_path / "out.pth", "bfloat16")
    weights = torch.load(target, weights_only=True)
    assert all(torch.equal(weights[name], value.bfloat16()) for name, value in model.state_dict().items())
    build_model(SHAPE).load_state_dict(weights)


def test_transformers_loads_it_and_gives_the_same_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = lively()
    folder = tmp_path / "hf"
    export(checkpoint_of(model, tmp_path, 3), folder)
    theirs, info = transformers.RwkvForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours, _ = model(tokens)
        torch.testing.assert_close(theirs.eval()(tokens).logits, ours, rtol=1e-4, atol=1e-4)


def test_a_directory_whose_name_holds_a_number(tmp_path: Path) -> None:
    """`.5b` is no ending; servers go by the names of files such as rwkv7-g1x-1.5b-20261201-ctx4096.pth."""
    target = export(checkpoint_of(lively(), tmp_path, 1), tmp_path / "rwkv-4-1.5b-20261201")
    assert target == tmp_path / "rwkv-4-1.5b-20261201/model.safetensors"


def test_names() -> None:
    assert TRANSFORMERS["rwkv4"].name("blocks.0.att.time_mix_k") == "rwkv.blocks.0.attention.time_mix_key"
    assert TRANSFORMERS["rwkv4"].name("blocks.0.ln0.weight") == "rwkv.blocks.0.pre_ln.weight"
    assert TRANSFORMERS["rwkv4"].name("head.weight") == "head.weight"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no", "out.pth"], "there is no checkpoint at no"),
        (
            ["step_000000001-0001", "out.gguf"],
            "out.gguf: the ending .gguf is not known\n  valid: .pth, .safetensors, a directory",
        ),
        (["step_000000001-0001", "out.7z"], "out.7z: the ending .7z is not known"),
        (["step_000000001-0001", "out.pth", "--dtype", "int4"], "--dtype int4 is not known\n  valid: float32"),
        (["step_000000001-0001", "/proc/out.pth"], "/proc/out.pth cannot be written"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    checkpoint_of(build_model(SHAPE), tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli(["export", *arguments]) == 2
    assert message in capfd.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_the_memory_is_that_of_two_parameters(tmp_path: Path, ending: str) -> None:
    """0.8 GB of weights in 3 files; the largest parameter has 67 MB."""
    model = build_model(ModelConfig("rwkv4", 12, 1024, 16384), device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)  # what memory holds may be no number, which `export` refuses
    path = checkpoint_of(model, tmp_path, 3)
    largest = max(4 * p.numel() for p in model.parameters())
    code = f"""
import pathlib
from rwkv_train.inference.export import export
from tests.checkpoint.metas import meta_of
def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
before = status("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
export(pathlib.Path({str(path)!r}), pathlib.Path({str(tmp_path / f"out.{ending}")!r}))
print(status("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) <= 2 * largest + 300e6
