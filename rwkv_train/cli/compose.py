"""From a command line to a Config: Hydra composes conf/, and what is wrong with it is told in our own words, at once.

Hydra's own check of a word knows only its spelling and advises to append it with `+`, the wrong cure for a typo. So
every word is handed to Hydra as one that may be new, and the typed reading (words.py) says what does not exist,
whether it was typed or stands in a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rwkv_train.cli.checks import Machine, check
from rwkv_train.cli.help import groups
from rwkv_train.config import Config, TrainerSettings
from rwkv_train.config.schema import DURATIONS, OPEN, Words, as_tree, flatten, identity, nearest, read, schema, show
from rwkv_train.errors import UserError, UserErrors
from rwkv_train.weights_header import Shape, read_shape

ROW = {"n_layer": "model.n_layer", "n_embd": "model.n_embd", "lr": "optim.lr", "final_lr": "optim.final_lr"}
BATCH = {"tokens": ("batch.tokens", 1024), "context": ("batch.context", 256)}  # for sizes whose row has no batch
LAYERED = ("experiment", "debug", "local")  # the groups that change the others' settings, in the order they are applied


@dataclass
class Line:
    """The words of one command line, sorted out."""

    choices: list[str] = field(default_factory=list)  # for Hydra: group=name
    values: list[str] = field(default_factory=list)  # for Hydra: ++word=value
    typed: Words = field(default_factory=dict)
    problems: list[UserError] = field(default_factory=list)


class Composer:
    """Composes command lines over some conf folders; made by `composer`, which opens Hydra around it."""

    def __init__(self, folders: Sequence[Path], machine: Machine) -> None:
        self.folders, self.machine = folders, machine
        self.groups = groups(folders)
        self.schema = schema()
        self.parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())

    def combinations(self, words: Sequence[str]) -> list[list[str]]:
        """The single command lines that a multirun stands for: `a=1,2 b=3,4` is four of them."""
        parsed, problems = self._parse(words)
        if problems:
            raise UserErrors(problems)
        try:
            lines: list[list[str]] = BasicSweeper.split_arguments(parsed, None)[0]
        except HydraException as error:
            raise UserError(f"-m: {error}", "lists (a=1,2), range(…), choice(…) and glob(…) can be expanded") from None
        return lines

    def settle(self, words: Sequence[str]) -> Config:
        """The checked config of one command line: nulls filled, named, trees resolved.

        Raises:
            UserErrors: everything that is wrong with it.
        """
        line = self._sort(words)
        tree, raw, chosen = self._compose(line)
        published = tree.get("model", {}).pop("published", None) or {}
        settings = flatten(tree)
        self._settle_durations(settings, line, chosen)
        stated = set(line.typed) | ({"model"} if any(c.startswith("model=") for c in line.choices) else set())
        line.problems += self._fill(settings, published, stated)
        named = settings.get("run.name") is not None
        settings["run.name"] = settings["run.name"] if named else "unnamed"
        config, problems = read({**settings, **{name: raw[name] for name in OPEN}})
        problems = line.problems + problems + _check_trees(raw)
        placed = None if config is None else replace(config, trainer=self._placed(config))
        if placed is not None:
            problems += check(placed, self.machine)
        if problems or config is None or placed is None:
            raise UserErrors(problems)
        if not named:
            digest = sha256(dumps(identity(as_tree(config)), sort_keys=True).encode()).hexdigest()[:8]
            placed = replace(placed, run=replace(config.run, name=f"{config.arch}-{config.model.size}-{digest}"))
        # only now, since a logger's directory is written with the run's name
        resolved = _resolve(OmegaConf.create({**as_tree(placed), **raw}))
        return replace(
            placed,
            **{name: resolved[name] for name in OPEN},
            resume_typed="resume" in line.typed,
        )

    def _placed(self, config: Config) -> TrainerSettings:
        """The trainer's settings with the job's own figures for auto, on which the run's name does not depend."""
        trainer, rank_info = config.trainer, self.machine.rank_info
        known = rank_info.ranks > 1 and not config.dry_run
        return replace(
            trainer,
            num_nodes=rank_info.machines if trainer.num_nodes == "auto" and known else trainer.num_nodes,
            devices=rank_info.per_node if trainer.devices == "auto" and known else trainer.devices,
        )

    def _parse(self, words: Sequence[str]) -> tuple[list[Override], list[UserError]]:
        parsed, problems = [], []
        for word in words:
            key, equals, value = word.partition("=")
            text = equals and self.schema.get(key) in (str, str | None)
            override: Override | None = None
            with suppress(HydraException):
                (override,) = self.parser.parse_overrides([word])
            if text and (override is None or not _is_text(override)):  # a path may hold any sign, a name may be 1e5
                (override,) = self.parser.parse_overrides([f"{key}={_quoted(value)}"])
            if override is None and self.schema.get(key) == tuple[str, ...] and value[:1] + value[-1:] == "[]":
                items = ",".join(_quoted(item.strip("'\" ")) for item in value[1:-1].split(","))  # such as <|user|>
                (override,) = self.parser.parse_overrides([f"{key}=[{items}]"])
            if override is not None:
                parsed.append(override)
            elif equals:
                problems.append(
                    UserError(f"{word} cannot be read", f"quote it for the shell and for Hydra: '{key}=\"{value}\"'")
                )
            else:
                problems.append(
                    UserError(f"{word!r} is no setting", "settings are typed as word=value, e.g. model=169m")
                )
        return parsed, problems

    def _sort(self, words: Sequence[str]) -> Line:
        line = Line()
        parsed, line.problems = self._parse(words)
        for override in parsed:
            problem = self._sort_one(override, line)
            if problem is not None:
                line.problems.append(problem)
        return line

    def _sort_one(self, override: Override, line: Line) -> UserError | None:
        word, text = override.key_or_group, override.input_line or ""
        top, bare = word.split(".")[0], text.lstrip("+~")
        adds = override.type in (OverrideType.ADD, OverrideType.FORCE_ADD)
        if override.is_sweep_override():
            return UserError(f"{text}: several values", "-m runs them one after the other; a list is typed as [a,b]")
        if top == "hydra" or top.startswith("hydra/"):
            return UserError(f"{text}: Hydra only composes here", "run.root= and run.name= say where a run lies")
        if override.type == OverrideType.DEL:
            if top in OPEN and word not in OPEN:
                line.values.append(text)
                return None
            return UserError(f"{text}: a word cannot be taken away", f"{word}=null, where it may be without a value")
        value = override.value()
        if word in self.groups:
            line.choices.append(bare)
            problem = self._check_choice(word, value if isinstance(value, list) else [value])
            if problem is not None:
                line.choices.pop()
            return problem
        if word == "model.size":
            return UserError(f"{text}: the size is chosen by model=", f"valid: {', '.join(self.groups['model'])}")
        if adds and top not in OPEN:
            near = word if word in self.schema else nearest(word, [*self.schema, *self.groups])
            return UserError(
                f"{text}: + adds words below {', '.join(OPEN[:-1])} and {OPEN[-1]} only",
                f"nearest: {near}=" if near else "--help lists all words",
            )
        line.values.append(f"++{bare}")
        line.typed.update(flatten({word: value}))
        return None

    def _check_choice(self, group: str, names: Sequence[Any]) -> UserError | None:
        valid = self.groups[group]
        for name in names:
            if name is None and (group in LAYERED or group == "logger"):
                continue
            if str(name) not in valid:
                near = nearest(str(name), valid)
                return UserError(
                    f"{group}={show(name)}: there is no such {group}",
                    (f"nearest: {near}; " if near else "") + f"valid: {', '.join(valid)}",
                )
        return None

    def _compose(self, line: Line) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Our settings, resolved; the open trees, as they are written; and what was chosen of each group."""
        search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in self.folders[1:])}]"] * (
            len(self.folders) > 1
        )
        try:
            cfg = compose("train", [*search, *line.choices, *line.values], return_hydra_config=True)
            chosen = dict(cfg.hydra.runtime.choices)
            raw = {name: OmegaConf.to_container(cfg[name]) if name in cfg else {} for name in OPEN}
            for name in ("hydra", *OPEN):
                OmegaConf.set_struct(cfg, False)
                cfg.pop(name, None)
            return _resolve(cfg), raw, chosen
        except yaml.YAMLError as error:
            raise UserErrors(
                [*line.problems, UserError(f"a file in conf/ is no YAML: {' '.join(str(error).split())}")]
            ) from None
        except (HydraException, OmegaConfBaseException) as error:
            raise UserErrors([*line.problems, UserError(" ".join(str(error).split()))]) from None

    def _settle_durations(self, settings: Words, line: Line, chosen: dict[str, Any]) -> None:
        """Of steps and tokens, the one that was said last counts: by a file of LAYERED, then by the command line."""
        sources = [self._file(group, chosen.get(group)) for group in LAYERED] + [line.typed]
        for span in DURATIONS:
            said: list[str] = []
            for source in sources:
                said = [u for u in ("steps", "tokens") if source.get(f"{span}.{u}") is not None] or said
            if len(said) == 1:  # both at once are refused by read()
                settings[f"{span}.{'tokens' if said == ['steps'] else 'steps'}"] = None

    def _file(self, group: str, name: Any) -> Words:
        for folder in self.folders:
            file = folder / group / f"{name}.yaml"
            if file.is_file():
                return flatten(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
        return {}

    def _fill(self, settings: Words, published: dict[str, Any], stated: set[str]) -> list[UserError]:
        """Fills what is null from the size's row for the arch, or from the weights to start from."""
        arch, size = settings["arch"], settings["model.size"]
        row, shape = published.get(arch, {}), None
        problems: list[UserError] = []
        if settings.get("init.weights") is not None:
            shape = read_shape(Path(str(settings["init.weights"])).expanduser())
        if shape is not None:
            problems = _contradictions(settings, shape, row if "model" in stated else {})
            if "model" not in stated:
                size, row = self._size_of(arch, shape)
                settings["model.size"] = size
            extended = shape._replace(vocab_size=shape.vocab_size + len(settings.get("vocab.extend") or ()))
            settings.update({f"model.{name}": value for name, value in extended._asdict().items()})
        for name, word in ROW.items():
            if settings.get(word) is None and name in row:
                settings[word] = row[name]
        for name, (word, otherwise) in BATCH.items():
            if settings.get(word) is None:
                settings[word] = row.get(name, otherwise)
        missing = [word for word in ROW.values() if settings.get(word) is None]
        if not missing:
            return problems
        for word in missing:  # so that the rest can be read and checked
            settings[word] = 2 if word.startswith("model") else 1.0
        table = "; ".join(f"{name}: {', '.join(rows)}" for name, rows in self._published().items())
        return [
            *problems,
            UserError(
                f"model={size} arch={arch}: nobody published this pair (published: {table})",
                f"by hand: {' '.join(f'{word}=…' for word in missing)}",
            ),
        ]

    def _published(self) -> dict[str, dict[str, Any]]:
        """Size → arch → row."""
        files = {name: self._file("model", name) for name in self.groups["model"]}
        rows: dict[str, dict[str, Any]] = {}
        for size, words in files.items():
            for word, value in words.items():
                top, _, rest = word.partition(".")
                if top == "published":
                    arch, _, name = rest.partition(".")
                    rows.setdefault(size, {}).setdefault(arch, {})[name] = value
        return rows

    def _size_of(self, arch: str, shape: Shape) -> tuple[str, dict[str, Any]]:
        for size, rows in self._published().items():
            row = rows.get(arch, {})
            if (row.get("n_layer"), row.get("n_embd")) == (shape.n_layer, shape.n_embd):
                return size, row
        return f"L{shape.n_layer}C{shape.n_embd}", {}


@contextmanager
def composer(folders: Sequence[Path], machine: Machine) -> Iterator[Composer]:
    """Opens Hydra over the conf folders; the first holds train.yaml."""
    with initialize_config_dir(config_dir=str(folders[0]), version_base="1.3", job_name="train"):
        yield Composer(folders, machine)


def _quoted(text: str) -> str:
    """As Hydra's grammar writes any text."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _is_text(override: Override) -> bool:
    return bool(override.is_sweep_override()) or override.value() is None or isinstance(override.value(), str)


def _resolve(cfg: DictConfig) -> dict[str, Any]:
    try:
        resolved = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserErrors([UserError(str(error).splitlines()[0], "mend the ${…} that it names")]) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _contradictions(settings: Words, shape: Shape, row: dict[str, Any]) -> list[UserError]:
    """Where what was typed says another shape than the weights have."""
    problems = []
    for name, value in shape._asdict().items():
        said = settings.get(f"model.{name}")
        said = row.get(name) if said is None else said
        if said is not None and value is not None and str(said) != str(value):
            problems.append(
                UserError(
                    f"model.{name}={said}, but init.weights={settings['init.weights']} has {value}",
                    "leave the shape out: the weights' own is taken",
                )
            )
    return problems


def _check_trees(raw: dict[str, Any]) -> list[UserError]:
    """Every logger and callback names its class; whether that exists is seen when Lightning is there."""
    return [
        UserError(
            f"{top}.{name} has no _target_", f"+{top}.{name}._target_=PACKAGE.CLASS, or {top}=NAME from conf/{top}"
        )
        for top, tree in raw.items()
        if top != "launcher"  # its class is known
        for name, entry in (tree or {}).items()
        if not isinstance(entry, dict) or "_target_" not in entry
    ]
