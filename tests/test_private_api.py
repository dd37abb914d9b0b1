"""Every private name of another library that the package uses, in one list: an upgrade that changes one fails here.

`PRIVATE` maps a name to a check that it exists, and to what it is needed for. A scan of the sources keeps the list
complete: a private name that is used and not listed fails, and so does one that is listed and no longer used.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceStrategy

PACKAGE = Path(__file__).parents[1] / "rwkv_train"
STANDARD_LIBRARY = {"_exit", "_value_", "_asdict", "_replace", "_sysconfigdata_"}  # documented, underscore or not
HYDRA_KEYS = {"_target_"}


@cache
def loop_state() -> dict[str, Any]:
    """State of the fit loop of a trainer that has run one step."""
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(BoringModel())
    return {"trainer": trainer, "loops": trainer.fit_loop.state_dict()}


def signal_connector() -> bool:
    return callable(loop_state()["trainer"]._signal_connector.register_signal_handlers)


def broadcast_of_sigterm() -> bool:
    return takes(loop_state()["trainer"].fit_loop.epoch_loop._broadcast_sigterm_tensor)


def steps_of_the_loop() -> bool:
    loop = loop_state()["trainer"].fit_loop.epoch_loop
    return loop._batches_that_stepped == 1 and "_batches_that_stepped" in loop_state()["loops"]["epoch_loop.state_dict"]


def forward_redirection() -> bool:
    called = inspect.signature(SingleDeviceStrategy()._forward_redirection.__call__)
    return list(called.parameters)[:3] == ["wrapper_module", "original_module", "method_name"]


def takes(function: Callable[..., Any], *names: str) -> bool:
    return list(inspect.signature(function).parameters) == list(names)


def deepspeed_mapping() -> bool:
    """ZeRO-1/2 links a low-precision parameter to its part of the flat float32 partition by this attribute."""
    from deepspeed.utils import mixed_precision_linkage, tensor_fragment

    source = inspect.getsource(tensor_fragment) + inspect.getsource(mixed_precision_linkage)
    return all(name in source for name in ("_hp_mapping", "lp_fragment_address", "hp_fragment_address", "hp_fragment"))


def deepspeed_operators() -> bool:
    import deepspeed

    return "__compatible_ops__" in inspect.getsource(deepspeed.ops)


def sweeper() -> bool:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return callable(BasicSweeper.split_arguments)


def fake_tensors() -> bool:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return bool(torch.empty(2).untyped_storage()._cdata != 0)


def foreign_norms() -> bool:
    return [float(norm) for norm in torch._foreach_norm([torch.tensor([3.0, 4.0])])] == [5.0]


def rebuild(name: str) -> Callable[[], bool]:
    return lambda: callable(getattr(torch._utils, name))


def module_of_a_strategy() -> bool:
    return SingleDeviceStrategy()._lightning_module is None


PRIVATE: dict[str, tuple[Callable[[], bool], str]] = {
    "_signal_connector": (
        signal_connector,
        "Lightning's SIGTERM handler broadcasts inside the handler: replaced",
    ),
    "_broadcast_sigterm_tensor": (
        broadcast_of_sigterm,
        "a collective and a wait before each pass, for a handler that is replaced: left out",
    ),
    "_batches_that_stepped": (steps_of_the_loop, "the loop's counter, set on resume and rewind"),
    "_forward_redirection": (forward_redirection, "the probe loss goes through DeepSpeed's engine"),
    "_lightning_module": (module_of_a_strategy, "a failed start leaves meta parameters that must not be moved"),
    "_init_config_if_needed": (lambda: takes(DeepSpeedStrategy._init_config_if_needed, "self"), "ZeRO-3 parameters"),
    "_init_deepspeed_distributed": (
        lambda: takes(DeepSpeedStrategy._init_deepspeed_distributed, "self"),
        "ZeRO on CPUs, which Lightning refuses",
    ),
    "_format_batch_size_and_grad_accum_config": (
        lambda: takes(DeepSpeedStrategy._format_batch_size_and_grad_accum_config, "self"),
        "the configuration without Lightning's choice of a precision mode",
    ),
    "_initialize_deepspeed_train": (
        lambda: takes(DeepSpeedStrategy._initialize_deepspeed_train, "self", "model"),
        "DeepSpeed's start without its warnings",
    ),
    "_hp_mapping": (deepspeed_mapping, "this rank's part of a parameter's optimiser state under ZeRO-1/2"),
    "__compatible_ops__": (deepspeed_operators, "on CPUs DeepSpeed compiles no operator of its own"),
    "hydra._internal.core_plugins.basic_sweeper": (sweeper, "splits a sweep's values as `-m` does"),
    "torch._subclasses.fake_tensor": (fake_tensors, "shapes and activation bytes without memory"),
    "_cdata": (fake_tensors, "distinguishes storages"),
    "_foreach_norm": (foreign_norms, "the norms of all gradients in one kernel"),
    "torch._utils": (rebuild("_rebuild_tensor_v2"), "named in .pth files"),
    "_rebuild_tensor_v2": (rebuild("_rebuild_tensor_v2"), "named in .pth files"),
    "_rebuild_parameter": (rebuild("_rebuild_parameter"), "named in .pth files"),
}


@pytest.mark.parametrize("name", PRIVATE)
@pytest.mark.filterwarnings("ignore")
def test_a_private_name_is_what_it_was(name: str) -> None:
    check, purpose = PRIVATE[name]
    assert check(), f"{name} has changed; it is used for this: {purpose}"


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name != "__compatible_ops__") and name != "_"


def own_names(tree: ast.Module) -> Iterator[str]:
    """Names that a source file defines: functions, classes, variables, arguments, and attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def foreign_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names of others in a source file: attributes, modules, and names that are given as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            if any(private(part) for part in node.module.split(".")):
                yield node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if text == "torch._utils" or (private(text) and text.isidentifier() and f"{text}" not in own):
                yield text


# Text that begins with an underscore and is no name of another library's: endings and separators of our own names.
OWN_TEXT = {"_offload", "_of_", "_backward"}


def test_the_list_is_complete() -> None:
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    own = {name for tree in trees for name in own_names(tree)} - set(PRIVATE)
    used = {name for tree in trees for name in foreign_names(tree, own)}
    used -= STANDARD_LIBRARY | HYDRA_KEYS | OWN_TEXT
    assert used == set(PRIVATE)


def test_the_scan_sees_each_kind() -> None:
    source = "from torch._C import x\ndef f(a):\n    a._theirs, a._ours\n    getattr(a, '_text')\ndef _ours(): ...\n"
    tree = ast.parse(source)
    assert set(foreign_names(tree, set(own_names(tree)))) == {"torch._C", "_theirs", "_text"}


def test_the_loop_state_has_the_keys_that_a_resume_sets() -> None:
    keys = set(loop_state()["loops"])
    assert {"epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict"} <= keys
    assert "epoch_loop.automatic_optimization.optim_progress" in keys


def test_a_fused_optimiser_skips_its_update_where_found_inf_says_so() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones(3)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3))


def test_zero_3_parameters_carry_their_shard() -> None:
    from deepspeed.runtime.zero import partition_parameters

    source = inspect.getsource(partition_parameters)
    assert "ds_tensor" in source
    assert "ds_numel" in source
