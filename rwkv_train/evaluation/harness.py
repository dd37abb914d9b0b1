"""lm-evaluation-harness (`lm-eval`) on a model of ours: its tasks, its prompts and its metrics, our scores.

The scores are those of its own adapter for transformers, up to rounding. What texts share is read once
(`prefixes.py`), nothing depends on the batch, and no text is too long unless a length is given.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from rich.progress import Progress

from rwkv_train.data.rows import IGNORED
from rwkv_train.data.tokenizers import Tokenizer
from rwkv_train.errors import UserError
from rwkv_train.evaluation.prefixes import Begun, share
from rwkv_train.evaluation.scoring import score
from rwkv_train.inference.continuation import continue_texts, join_states
from rwkv_train.inference.sampling import Sampling
from rwkv_train.models import LanguageModel, State

_AT_ONCE = 1024  # tokens of each row that are read in one pass
_SHOTS_SEED = 1234  # of the choice of examples, lm-eval's own

Request = tuple[Any, list[int], list[int]]  # what it is called in a cache; tokens of the context; of what follows it


class Harness(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """The adapter.

    Args:
        model: on any device.
        tokenizer: its own.
        batch: requests at once.
        max_length: tokens that a prediction may see, as transformers' models have it; None: all that came before.
        seed: of the draws of tasks that sample.
        progress: where it is shown how far the requests are.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        batch: int,
        max_length: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.model, self.text, self.batch_size, self.max_length, self.seed = model, tokenizer, batch, max_length, seed
        self.max_gen_toks = 256  # where a task does not say
        self._progress = progress or Progress(disable=True)

    @property
    def eot_token_id(self) -> int:
        return self.text.end_of_text

    @property
    def tokenizer_name(self) -> str:
        return self.text.identity

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **words: Any) -> list[int]:
        tokens: list[int] = self.text.encode(string.encode()).tolist()
        return tokens

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, the first token's after an end-of-text."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            if self.max_length is None:
                cut = [([self.eot_token_id], tokens)] if tokens else []
            else:
                rolled = utils.get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, 1)
                cut = [utils.make_disjoint_window(window) for window in rolled]
            windows += [(None, context, continuation) for context, continuation in cut]
            owners += [number] * len(cut)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Request], **words: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy continuation) of each request."""
        texts, firsts = [], []  # what is read, and where in it the first prediction stands
        for _, context, continuation in requests:
            text = [*context, *continuation]
            text = text if self.max_length is None else text[-(self.max_length + 1) :]
            texts.append(text[:-1])
            firsts.append(max(0, len(text) - len(continuation) - 1))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        bar = self._progress.add_task("scoring", total=len(requests))
        for rows in share(self.model, texts, firsts, self.batch_size):
            goals = [requests[row.number][2] for row in rows]
            for row, found in zip(rows, self._score(rows, texts, goals), strict=True):
                results[row.number] = found
                name = requests[row.number][0]
                if name is not None:
                    self.cache_hook.add_partial("loglikelihood", name, found)
            self._progress.advance(bar, len(rows))
        self._progress.remove_task(bar)
        return results

    def _score(
        self, rows: Sequence[Begun], texts: Sequence[Sequence[int]], goals: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Reads the rest of each row and scores its last len(goals) predictions; what pads a row is behind its end."""
        device = self.model.emb.weight.device
        width = max(len(texts[row.number]) - row.read for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        targets = torch.full((len(rows), width), IGNORED)
        for place, (row, goal) in enumerate(zip(rows, goals, strict=True)):
            rest = texts[row.number][row.read :]
            scored = goal[-len(rest) :]
            tokens[place, : len(rest)] = torch.tensor(rest)
            targets[place, len(rest) - len(scored) : len(rest)] = torch.tensor(scored)
        state: State | None
        state = join_states(self.model, [row.state for row in rows])
        nats, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
        for part, goal in zip(tokens.split(_AT_ONCE, 1), targets.split(_AT_ONCE, 1), strict=True):
            found, state = score(self.model, part.to(device), goal.to(device), state)
            nats += found.nats.double().sum(1).cpu()
            greedy &= found.greedy.all(1).cpu()
        return [(-float(nat), bool(best)) for nat, best in zip(nats, greedy, strict=True)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to its stop strings or the end of the text."""
        results = [""] * len(requests)
        kinds: dict[str, list[int]] = {}  # requests that are generated in the same way
        for number, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(number)
        bar = self._progress.add_task("generating", total=len(requests))
        for numbers in kinds.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
            tokens = int(settings["max_gen_toks"])
            stops = [stop.encode() for stop in settings["until"] if stop]
            sampling = _sampling(settings)
            texts = [self._context(requests[number].args[0], tokens) for number in numbers]
            whole = sampling.repetition_penalty != 1  # it is for all tokens that were read, so they must be at hand
            limits = [0 if whole else len(text) - 1 for text in texts]
            for rows in share(self.model, texts, limits, self.batch_size):
                prompts = [(texts[row.number][row.read :], row.state) for row in rows]
                seeds = [self.seed + numbers[row.number] for row in rows]
                found = continue_texts(self.model, self.text, prompts, tokens, sampling, seeds, stops)
                for row, text in zip(rows, found, strict=True):
                    number = numbers[row.number]
                    results[number] = text.text.decode(errors="replace")
                    self.cache_hook.add_partial("generate_until", requests[number].args, results[number])
                self._progress.advance(bar, len(rows))
        self._progress.remove_task(bar)
        return results

    def _context(self, context: str, tokens: int) -> list[int]:
        """The tokens of a context, an end-of-text where it is empty; cut on the left where a length is to be kept."""
        text = self.tok_encode(context) or [self.eot_token_id]
        return text if self.max_length is None else text[-max(1, self.max_length - tokens) :]


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    if not settings.get("do_sample"):
        return Sampling(0, repetition_penalty=float(settings.get("repetition_penalty", 1.0)))
    return Sampling(
        float(settings.get("temperature", 1.0)),
        float(settings.get("top_p", 1.0)),
        int(settings.get("top_k", 0)),
        float(settings.get("repetition_penalty", 1.0)),
    )


def find_tasks(names: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    """The tasks of your own folders, and lm-eval's where one of the names is not among them.

    Raises:
        UserError: a folder is not there, or a task does not exist; the nearest one is named.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--include {folder}: there is no such directory", "give one with tasks' YAML files in it")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = [str(folder) for folder in folders]
    tasks = TaskManager(include_path=paths, include_defaults=False)
    if not all(tasks.match_tasks([name]) for name in names):
        tasks = TaskManager(include_path=paths)  # reading all of lm-eval's takes seconds
    for name in names:
        if not tasks.match_tasks([name]):
            near = difflib.get_close_matches(name, tasks.all_tasks, 1)
            hint = f"nearest: {near[0]}; " if near else ""
            raise UserError(
                f"--tasks {name}: there is no such task",
                f"{hint}`lm-eval ls tasks` lists lm-eval's, --include DIRECTORY adds your own",
            )
    return tasks


def run_tasks(
    lm: TemplateLM, names: Sequence[str], tasks: TaskManager, shots: int | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """The metrics of each task or group.

    Args:
        lm: the model.
        names: of the tasks.
        tasks: of find_tasks.
        shots: examples before each question; None: as the task says.
        limit: at most so many questions of each; None: all.

    Raises:
        UserError: a task's data cannot be had here.
    """
    try:
        loaded = tasks.load(list(names))
    except (ConnectionError, FileNotFoundError, ValueError) as error:  # `datasets` raises each of them, by its version
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--tasks {','.join(names)}: the data of a task cannot be read: {reason}",
            "a task whose data lie on this machine needs `dataset_path: json` and `data_files` in its YAML",
        ) from None
    for task in loaded["tasks"].values():
        usual = task.get_config("num_fewshot")
        if usual is None or (shots is not None and usual != 0):  # a task's own 0 stays: it has no examples
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=_SHOTS_SEED)
    found = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=False, verbosity="ERROR")
    results: dict[str, dict[str, Any]] = {}
    for name, metrics in found["results"].items():
        shown = {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, float | int)}
        results[name] = {key: value for key, value in shown.items() if "stderr" not in key}
    return results
