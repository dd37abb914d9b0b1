"""Overrides become a Config, or messages that name the errors; all without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rwkv_train.cli.checks import Machine
from rwkv_train.cli.conf_folders import ConfFolders
from rwkv_train.cli.configure import ConfigBuilder, config_builder
from rwkv_train.cluster.rank_info import RankInfo
from rwkv_train.config import Duration
from rwkv_train.config.interpolation import resolved_open_tree
from rwkv_train.config.schema import as_tree, differences, durations, from_tree, identity
from rwkv_train.errors import UserError, UserErrors
from rwkv_train.resources import resource
from tests.data.test_indexed import ours
from tests.runs import save_weights

CONF = resource("conf")
NO_RUNS = "run.root=no-such-folder"  # so that no run of the checkout matters


@pytest.fixture
def conf() -> Iterator[ConfigBuilder]:
    with config_builder([CONF], Machine(cores=2)) as made:
        yield made


def mistakes(conf: ConfigBuilder, *overrides: str) -> list[UserError]:
    with pytest.raises(UserErrors) as caught:
        conf.build([NO_RUNS, *overrides])
    return caught.value.problems


# Overrides → patterns of the messages, one for each message.
WRONG_OVERRIDES = {
    "unknown key": (["model.n_layers=4"], ["model.n_layers=4: there is no model.n_layers.*nearest: model.n_layer;"]),
    "a key without its group": (["n_layer=4"], ["there is no n_layer.*nearest: model.n_layer;"]),
    "unknown group": (["modle=7b"], ["there is no modle.*nearest: model;"]),
    "Lightning's name": (["trainer.max_steps=4"], ["there is no trainer.max_steps.*nearest: budget.steps;"]),
    "Lightning's checkpoint": (["ckpt_path=x"], ["there is no ckpt_path.*nearest: resume;"]),
    "unknown size": (["model=70m"], ["model=70m: there is no such model.*valid: nano, small, tiny, 0.1b, 169m"]),
    "unknown optimiser": (["optim=sgd"], ["optim=sgd: there is no such optim.*valid: adam"]),
    "no size": (["model=null"], ["model=null: there is no such model"]),
    "a value for a group of settings": (
        ["budget=3"],
        ["budget.steps is missing", "tokens", "hours", "budget=3: budget is"],
    ),
    "the size's name": (["model.size=huge"], ["the size is chosen by model="]),
    "several sizes": (["model=7b,14b"], ["several values.*-m"]),
    "+ for a setting that exists": (
        ["+seed=3"],
        ["adds settings below logger, callbacks and launcher only.*nearest: seed="],
    ),
    "+ for a typo": (
        ["+model.n_layers=3"],
        ["adds settings below logger, callbacks and launcher only.*nearest: model.n_layer="],
    ),
    "a setting removed": (["~seed"], ["~seed: a setting cannot be removed"]),
    "Hydra's own": (["hydra.run.dir=x"], ["hydra.run.dir=x: Hydra only composes.*run.root="]),
    "no override": (["train"], ["'train' is not an override.*setting=value"]),
    "not readable": (["batch.tokens={{"], ["batch.tokens={{ cannot be parsed.*quote"]),
    "text for a number": (["seed=abc"], ["seed=abc is not valid.*a whole number at least 0"]),
    "half a step": (["budget.steps=1.5"], ["budget.steps=1.5 is not valid.*a whole number"]),
    "a number for a switch": (["compile=1"], ["compile=1 is not valid.*true or false"]),
    "a switch for a number": (["model.n_embd=true"], ["model.n_embd=true is not valid"]),
    "nothing for a number": (["seed="], ["seed= is not valid"]),
    "infinite": (["optim.lr=inf"], ["optim.lr=inf is not valid"]),
    "n_embd not positive": (["model.n_embd=0"], ["model.n_embd=0 is not valid.*at least 2"]),
    "n_layer not positive": (["model.n_layer=-1"], ["model.n_layer=-1 is not valid.*at least 1"]),
    "one of a few": (
        ["optim.schedule.shape=cosin"],
        ["cosin is not valid.*constant, exponential, cosine; nearest: cosine"],
    ),
    "a list too short": (["optim.betas=[0.9]"], ["optim.betas"]),
    "a beta of 1": (["optim.betas=[0.9,1]"], ["optim.betas.*at least 0 and below 1"]),
    "a rule's key": (["optim.rules=[{patern: x}]"], ["optim.rules.*{pattern, lr, weight_decay}"]),
    "a rule's pattern": (["optim.rules=[{pattern: '('}]"], ["optim.rules: '\\(' is not a regular expression"]),
    "vocabulary": (
        ["model.vocab_size=100"],
        ["model.vocab_size=100 is smaller than the 2048 tokens of data.tokenizer=bpe:2048"],
    ),
    "no path": (["data=text"], ["data.path is not given"]),
    "path missing": (["data.path=/no/such"], ["data.path=/no/such: there is no such file"]),
    "path with signs": (["data.path=~/a (b)=é,"], [r"data.path=~/a \(b\)=é,: there is no such file"]),
    "batch": (["batch.tokens=2000", "trainer.accelerator=cpu"], ["batch.tokens=2000 is not a multiple of 256.*1792"]),
    "micro-batch": (["batch.micro=3", "trainer.devices=1"], ["1024 is not a multiple of 768.*batch.micro=3.*768"]),
    "devices": (["trainer.devices=3", "trainer.accelerator=cpu"], ["trainer.devices=3: this machine has 2 CPU cores"]),
    "no device": (["trainer.devices=0"], ["trainer.devices=0 is not valid.*auto or a whole number at least 1"]),
    "float16": (["trainer.precision=16-mixed"], ["16-mixed: float16 overflows.*auto, 32-true, bf16-mixed"]),
    "true bf16": (["trainer.precision=bf16-true"], ["bf16-true: decay, bonus, mix and norm .* float32"]),
    "64": (["trainer.precision=64-true"], ["64-true: the engines compute in float32"]),
    "32": (["trainer.precision=32"], ["trainer.precision=32: the name is abbreviated.*auto, 32-true"]),
    "unknown precision": (["trainer.precision=best"], ["precision=best: there is no such precision"]),
    "accelerator": (["trainer.accelerator=gpus"], ["gpus is not valid.*nearest: gpu"]),
    "two budgets": (["budget.steps=10", "budget.tokens=10k"], ["budget.steps=10 and budget.tokens=10000 exclude"]),
    "no budget": (["budget.steps=null"], ["no training budget is set", "cosine needs the length"]),
    "cosine by the clock": (["budget.steps=null", "budget.hours=1"], ["cosine needs the length of the run.*constant"]),
    "no steps": (["budget.steps=0"], ["budget.steps=0 is not valid.*at least 1"]),
    "never a checkpoint": (["checkpoint.every.steps=0"], ["checkpoint.every.steps=0"]),
    "a span of nothing": (["validation.every.steps=null"], ["validation.every is not given"]),
    "rates the wrong way round": (["optim.lr=1e-5"], ["optim.final_lr=0.0001 is above optim.lr=1e-05"]),
    "exponential to 0": (["optim.schedule.shape=exponential", "optim.final_lr=0"], ["never reaches 0"]),
    "name": (["run.name=a=b"], ["run.name='a=b' is not valid.*without any of"]),
    "name with a blank": (["run.name=a b"], ["run.name='a b' is not valid"]),
    "name that leads out": (["run.name=.."], [r"run.name='\.\.' is not valid"]),
    "resume": (["resume=atuo"], ["resume=atuo: there is no such checkpoint.*auto, never"]),
    "weights": (["init.weights=/no/such", "data.tokenizer=bytes"], ["init.weights=/no/such: there is no such file"]),
    "a logger by another name": (["logger=csv", "logger.cvs.name=x"], ["logger.cvs has no _target_"]),
    "interpolation": (["seed=${sead}"], ["sead"]),
    "several mistakes": (
        ["model.n_layers=4", "data.path=/no/such", "batch.tokens=3", "trainer.devices=1", "optim=x"],
        ["optim=x: there is no such optim", "there is no model.n_layers", "/no/such", "batch.tokens=3 is not"],
    ),
}


@pytest.mark.parametrize("case", WRONG_OVERRIDES)
def test_an_error_is_reported(case: str, conf: ConfigBuilder) -> None:
    overrides, expected = WRONG_OVERRIDES[case]
    problems = mistakes(conf, *overrides)
    messages = [str(problem) for problem in problems]
    assert len(messages) == len(expected), messages
    for message, pattern in zip(messages, expected, strict=True):
        assert re.search(pattern, message, re.DOTALL), message
        assert len(message.splitlines()) <= 2
    assert all(problem.what.strip() and problem.remedy.strip() for problem in problems) or case == "interpolation"


def test_the_default_run(conf: ConfigBuilder) -> None:
    config = conf.build([])
    assert (config.arch, config.model.size, config.data.source) == ("rwkv7", "tiny", "stdlib")
    assert (config.data.tokenizer, config.optim.eps, config.optim.weight_decay) == ("bpe:2048", 1e-18, 0.1)
    assert (config.model.n_layer, config.model.n_embd) == (4, 192)
    assert (config.batch.context, config.batch.tokens, config.budget.total) == (256, 1024, Duration(steps=4000))
    assert (config.trainer.precision, config.optim.schedule.shape) == ("auto", "cosine")
    assert config.optim.betas == (0.9, 0.99)
    assert not config.resume_typed
    assert conf.build(["resume=auto", NO_RUNS]).resume_typed


@pytest.mark.parametrize(
    ("size", "n_layer", "n_embd", "lr", "final_lr"),
    [  # arXiv 2305.13048, appendix; 14B's last rate and all first ones as in the authors' code
        ("169m", 12, 768, 6e-4, 1e-5),
        ("430m", 24, 1024, 4e-4, 1e-5),
        ("1b5", 24, 2048, 3e-4, 1e-5),
        ("3b", 32, 2560, 1.5e-4, 1e-5),
        ("7b", 32, 4096, 1.5e-4, 1e-5),
        ("14b", 40, 5120, 1e-4, 7e-6),
    ],
)
def test_published_sizes(size: str, n_layer: int, n_embd: int, lr: float, final_lr: float, conf: ConfigBuilder) -> None:
    config = conf.build(["arch=rwkv4", f"model={size}"])
    assert (config.model.n_layer, config.model.n_embd) == (n_layer, n_embd)
    assert (config.optim.lr, config.optim.final_lr) == (lr, final_lr)
    by_hand = conf.build(["arch=rwkv4", f"model={size}", "model.n_layer=3", "optim.lr=0.1"])
    assert (by_hand.model.n_layer, by_hand.model.n_embd, by_hand.optim.lr) == (3, n_embd, 0.1)


CHOICES = [(group, name) for group, names in ConfFolders([CONF]).groups.items() if group != "local" for name in names]


RELEASE_NAMES = {"0.1b": "169m", "0.4b": "430m", "1.5b": "1b5", "2.9b": "3b", "7.2b": "7b", "13.3b": "14b"}  # RWKV-7's


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_file_of_conf_composes(group: str, name: str, conf: ConfigBuilder, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    weights = save_weights(tmp_path / "weights.pth", n_layer=2, n_embd=8)
    overrides = [f"{group}={name}", f"run.root={tmp_path}", f"data.path={tmp_path / 'text.txt'}"]
    if name == "finetune":
        overrides.append(f"init.weights={weights}")
    if name == "store":
        overrides += [f"data.path={ours(tmp_path / 'x')}", "data.tokenizer=world"]
    if name == "mixture":
        overrides.append(f"data.sources=[{{name:a,path:{tmp_path / 'text.txt'}}}]")
    config = conf.build(overrides)
    if group == "model":
        assert config.model.size == RELEASE_NAMES.get(name, name)
    if group in ("experiment", "debug"):
        head = (CONF / group / f"{name}.yaml").read_text().splitlines()
        assert head[0] == "# @package _global_"
        assert head[1].startswith(f"# python train.py {group}={name}")
        assert head[2].startswith("# ")


def test_tokens_of_ones_own_need_no_quotes(conf: ConfigBuilder) -> None:
    for typed in ("[<|user|>,it's]", "['<|user|>',\"it's\"]"):
        assert conf.build([f"vocab.extend={typed}"]).vocab.extend == ("<|user|>", "it's")
    assert conf.build(["vocab.extend=[a,b]"]).vocab.extend == ("a", "b")


def test_a_pair_that_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("size: mine\npublished: {rwkv9: {n_layer: 1}}\n")
    with config_builder([CONF, tmp_path], Machine(cores=2)) as conf:
        (problem,) = mistakes(conf, "model=mine", "model.n_layer=3")
        assert "no published configuration for model=mine arch=rwkv7" in problem.what
        assert "7b: rwkv4" in problem.what
        assert "mine: rwkv9" in problem.what
        assert problem.remedy == "give it by hand: model.n_embd=… optim.lr=… optim.final_lr=…"
        overrides = ["model.n_layer=3", "model.n_embd=64", "optim.lr=1e-3", "optim.final_lr=1e-4"]
        assert conf.build(["model=mine", *overrides]).model.n_embd == 64


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    own = tmp_path / "experiment" / "own.yaml"
    own.write_text("# @package _global_\ndefaults: [{override /model: nano}]\nbudget: {tokens: 1M}\n")
    with config_builder([CONF, tmp_path], Machine(cores=2)) as conf:
        config = conf.build(["experiment=own"])
        assert (config.model.n_layer, config.budget.total) == (2, Duration(tokens=10**6))
        own.write_text("# @package _global_\nbudget: {stepps: 3}\n")
        (problem,) = mistakes(conf, "experiment=own")
        assert "there is no budget.stepps" in problem.what
        assert "budget.steps" in problem.remedy
        own.write_text("# @package _global_\nbudget: {tokens: 3, steps: 4}\n")
        (problem,) = mistakes(conf, "experiment=own")
        assert "exclude each other" in problem.what
        own.write_text("budget: [\n")
        (problem,) = mistakes(conf, "experiment=own")
        assert "own.yaml" in problem.what


def test_the_duration_that_is_given_last_counts(conf: ConfigBuilder, tmp_path: Path) -> None:
    paper = ["experiment=paper_169m", f"data.path={CONF}", NO_RUNS]
    config = conf.build(paper)
    assert config.budget.total == Duration(tokens=332 * 10**9)
    assert config.checkpoint.every == Duration(tokens=10**9)
    assert config.optim.schedule.hold == Duration(tokens=149 * 10**8)
    assert conf.build([*paper, "budget.steps=7"]).budget.total == Duration(steps=7)
    assert conf.build([*paper, "debug=fast"]).budget.total == Duration(steps=3)
    assert conf.build(["budget.tokens=10k"]).budget.total == Duration(tokens=10_000)
    assert conf.build(["budget={tokens: 10k}"]).budget.total == Duration(tokens=10_000)
    hold = conf.build(["optim.schedule.hold.tokens=1.5M", "optim.schedule.warmup.tokens=1e5"]).optim.schedule
    assert (hold.hold, hold.warmup) == (Duration(tokens=1_500_000), Duration(tokens=100_000))
    config = conf.build(["budget.steps=null", "budget.hours=1", "optim.schedule.shape=constant"])
    assert (config.budget.total, config.budget.hours) == (None, 1.0)


@pytest.mark.parametrize("name", durations())
def test_every_duration_is_checked(name: str, conf: ConfigBuilder) -> None:
    """Whatever its class says: one unit at a time, required or not, zero or not."""
    messages = [str(problem) for problem in mistakes(conf, f"{name}.steps=5", f"{name}.tokens=5k", "seed=x")]
    assert any(f"{name}.steps=5 and {name}.tokens=5000 exclude each other" in message for message in messages)
    zero = [str(problem) for problem in mistakes(conf, f"{name}.tokens=0", "seed=x")]
    allowed = name in ("optim.schedule.warmup", "optim.schedule.hold")
    assert any(f"{name}.tokens=0 is not valid" in message for message in zero) == (not allowed)
    none = [str(problem) for problem in mistakes(conf, f"{name}.steps=null", f"{name}.tokens=null", "seed=x")]
    optional = name in ("budget", "checkpoint.permanent")
    assert any(f"{name} is not given" in message for message in none) == (not optional)


def test_the_identity_of_a_run_is_without_how_it_is_operated(conf: ConfigBuilder) -> None:
    names = set(identity(as_tree(conf.build([]))))
    assert {"optim.lr", "seed", "data.path", "trainer.devices", "checkpoint.keep"} <= names
    assert not names & {"run.name", "watchdog.factor", "health.z", "statistics.every.steps", "resume", "logger", "mfu"}


def test_an_unknown_setting_in_a_published_row(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    row = "n_layer: 1, n_embd: 8, lr: 1e-3, final_lr: 1e-4, betas: [0.8, 0.9]"
    (tmp_path / "model" / "mine.yaml").write_text(f"size: mine\npublished: {{rwkv4: {{{row}, epss: 1}}}}\n")
    with config_builder([CONF, tmp_path], Machine(cores=2)) as conf:
        (problem,) = mistakes(conf, "model=mine")
        assert problem.what == "conf/model/mine.yaml: published.rwkv4.epss: there is no such setting"
        assert problem.remedy.startswith("nearest: eps; valid: ")


def test_a_published_row_may_hold_any_setting_of_the_optimiser(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    row = "n_layer: 1, n_embd: 8, lr: 1e-3, final_lr: 1e-4, eps: 1e-18, clip: 0.5"
    (tmp_path / "model" / "mine.yaml").write_text(f"size: mine\npublished: {{rwkv4: {{{row}}}}}\n")
    with config_builder([CONF, tmp_path], Machine(cores=2)) as conf:
        optim = conf.build(["arch=rwkv4", "model=mine", "optim.eps=null"]).optim
        assert (optim.eps, optim.clip) == (1e-18, 0.5)  # the row comes before conf/optim
        optim = conf.build(["arch=rwkv4", "model=mine", "optim.eps=1e-6", "optim.clip=null"]).optim
        assert (optim.eps, optim.clip) == (1e-6, None)


def test_the_name_of_a_run(conf: ConfigBuilder) -> None:
    name = conf.build([]).run.name
    assert re.fullmatch(r"rwkv7-tiny-[0-9a-f]{8}", name)
    for same in (
        ["run.root=elsewhere"],
        ["resume=never", NO_RUNS],
        ["logger=csv"],
        ["seed=1"],
        ["run.allow_changes=true"],
    ):
        assert conf.build(same).run.name == name
    others = [
        ["seed=2"],
        ["model=nano"],
        ["budget.steps=2001"],
        ["compile=true"],
        ["+callbacks.x._target_=lightning.A"],
    ]
    names = {conf.build(overrides).run.name for overrides in others}
    assert len(names | {name}) == len(others) + 1
    assert conf.build(["run.name=mine"]).run.name == "mine"


def test_a_logger_knows_the_name_of_the_run(conf: ConfigBuilder) -> None:
    config = conf.build(["logger=csv", "run.root=r", "logger.csv.path='${run.root}/${run.name}.csv'"])
    assert config.logger["csv"]["path"] == "${run.root}/${run.name}.csv"
    assert resolved_open_tree(config, "logger")["csv"]["path"] == f"r/{config.run.name}.csv"
    assert conf.build(["logger=wandb", "logger.wandb.project=mine"]).logger["wandb"]["project"] == "mine"
    assert conf.build(["logger=csv", "~logger.csv"]).logger == {}
    assert conf.build(["+callbacks.a._target_=b.C", "+callbacks.a.x=1"]).callbacks == {"a": {"_target_": "b.C", "x": 1}}


def test_text_may_hold_any_sign(conf: ConfigBuilder) -> None:
    for text in ("x = {'a': [1, 2]}", "größer (als)", "it's", 'say "hi"', "a\\b", "1e5"):
        overrides = [f"samples.prompt={text}"]
        assert conf.build(overrides).samples.prompt in (text, text.replace(" ", " ")), text


def test_never_asks_for_a_fresh_directory(conf: ConfigBuilder, tmp_path: Path) -> None:
    overrides = [f"run.root={tmp_path}", "run.name=mine", "resume=never"]
    assert conf.build(overrides).resume == "never"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").touch()
    with pytest.raises(UserErrors, match=r"resume=never, but .*mine holds a run"):
        conf.build(overrides)
    conf.machine = Machine(
        cores=2, rank_info=RankInfo(rank=1)
    )  # the second process starts when the first has made the directory
    assert conf.build(overrides).resume == "never"


def test_data_that_is_there_but_empty(conf: ConfigBuilder, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").touch()
    assert "is an empty directory" in mistakes(conf, "data=text", f"data.path={tmp_path / 'folder'}")[0].what
    assert "is an empty file" in mistakes(conf, "data=text", f"data.path={tmp_path / 'file.txt'}")[0].what


def test_there_and_back(conf: ConfigBuilder) -> None:
    overrides = [
        "optim.rules=[{pattern: .*decay, lr: 2.0}]",
        "logger=csv",
        "budget.tokens=1e9",
        "packages=[mine]",
        "trainer.devices=2",
    ]
    config = conf.build(overrides)
    written = yaml.safe_dump(as_tree(config), sort_keys=False)
    assert from_tree(yaml.safe_load(written)) == config
    assert from_tree(json.loads(json.dumps(as_tree(config)))) == config
    with pytest.raises(UserErrors, match=r"seed is missing"):
        from_tree({name: value for name, value in as_tree(config).items() if name != "seed"})


def test_what_differs(conf: ConfigBuilder) -> None:
    config = conf.build([])
    other = replace(
        config,
        seed=2,
        budget=replace(config.budget, total=Duration(tokens=5)),
        run=replace(config.run, name="x"),
        resume="never",
        logger={"a": {}},
    )
    assert differences(as_tree(config), as_tree(config)) == []
    assert differences(as_tree(config), as_tree(other)) == [
        "budget.steps: 4000 → None",
        "budget.tokens: None → 5",
        "seed: 1 → 2",
    ]
