"""The name of a checkpoint's directory, and the description in its meta.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rwkv_train.checkpoint.meta import META, CheckpointMeta
from rwkv_train.checkpoint.name import CheckpointName, attempt_of_temporary, checkpoints_below, temporary_path
from rwkv_train.errors import UserError
from tests.checkpoint.metas import meta_of


def test_a_name_and_its_parts() -> None:
    name = CheckpointName(400, 3)
    assert str(name) == "step_000000400-0003"
    for each in (name, CheckpointName(0, 1), CheckpointName(12_345_678_901, 12_345)):
        assert CheckpointName.parse(str(each)) == each
        assert CheckpointName.of(Path("runs") / str(each)) == each
    assert sorted([CheckpointName(9, 2), CheckpointName(10, 1), CheckpointName(9, 1)])[-1] == CheckpointName(10, 1)


@pytest.mark.parametrize(
    "name", ["step_000000400", "step_400-0003", "step_000000400-3", ".writing-step_000000400-0003", "latest", ""]
)
def test_what_is_no_name(name: str) -> None:
    assert CheckpointName.parse(name) is None
    with pytest.raises(ValueError, match="is not the name of a checkpoint, such as step_000000400-0003"):
        CheckpointName.of(Path("runs") / name)


def test_temporary_names() -> None:
    path = temporary_path(Path("c") / "step_000000400-0003")
    assert path == Path("c") / ".writing-step_000000400-0003"
    assert attempt_of_temporary(path.name) == 3
    assert attempt_of_temporary(temporary_path(Path("latest-0012")).name) == 12
    assert attempt_of_temporary("step_000000400-0003") is None


def test_checkpoints_below_a_run_come_oldest_first(tmp_path: Path) -> None:
    for name in ("step_000000010-0001", "step_000000009-0002", "step_000000009-0001", ".writing-step_000000011-0001"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    found = [path.name for path in checkpoints_below(tmp_path)]
    assert found == ["step_000000009-0001", "step_000000009-0002", "step_000000010-0001"]
    assert checkpoints_below(tmp_path / "nothing") == []


def written(folder: Path, **changes: Any) -> Path:
    (folder / META).write_text(json.dumps({**meta_of().as_json(), **changes}))
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    meta = meta_of(
        batches=((0, 128), (7, 256)),
        shapes={"a": (2, 3), "b": ()},
        position={"offset": 5},
        val_loss=2.5,
        config={"seed": 1},
    )
    (tmp_path / META).write_text(json.dumps(meta.as_json()))
    assert CheckpointMeta.read(tmp_path) == meta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "5"}, r"step is '5', not of type int"),
        ({"step": True}, r"step is True, not of type int"),
        ({"probe": "nan"}, r"probe is 'nan', not of type float or null"),
        ({"probe_sample": None}, r"probe_sample is None, not of type int"),
        ({"val_loss": "low"}, r"val_loss is 'low', not of type float or null"),
        ({"config": []}, r"config is \[\], not of type dict"),
        ({"batches": [[1]]}, r"batches or shapes are not lists of integers"),
        ({"shapes": {"a": ["x"]}}, r"batches or shapes are not lists of integers"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"meta\.json: {message}\n  use another checkpoint; init\.weights="):
        CheckpointMeta.read(written(tmp_path, **changes))


def test_missing_fields_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"meta\.json cannot be read \(FileNotFoundError"):
        CheckpointMeta.read(tmp_path)
    content = meta_of().as_json()
    del content["probe"], content["writers"]
    (tmp_path / META).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"meta\.json lacks probe, writers\n"):
        CheckpointMeta.read(tmp_path)
    (tmp_path / META).write_text("[]")
    with pytest.raises(UserError, match="does not hold a JSON object"):
        CheckpointMeta.read(tmp_path)
    (tmp_path / META).write_text('{"step": ')
    with pytest.raises(UserError, match=r"cannot be read \(JSONDecodeError"):
        CheckpointMeta.read(tmp_path)


def test_names_and_descriptions_need_no_torch() -> None:
    program = "import sys, rwkv_train.checkpoint.name, rwkv_train.checkpoint.meta; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
