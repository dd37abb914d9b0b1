"""An adapter of our models to lm-evaluation-harness (`lm-eval`), which provides tasks, prompts and metrics.

Scores equal those of its own adapter for transformers, up to rounding. Shared prefixes are read once (prefixes.py),
nothing depends on the batch, and the length of a text is unlimited unless `max_length` is given.
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

from rwkv_train.data.rows import IGNORED_TARGET
from rwkv_train.data.tokenizers import Tokenizer
from rwkv_train.errors import UserError
from rwkv_train.evaluation.prefixes import PrefixedText, share_prefixes
from rwkv_train.evaluation.scoring import score
from rwkv_train.inference.continuation import continue_texts, join_states
from rwkv_train.inference.sampling import Sampling
from rwkv_train.models import LanguageModel, State

_TOKENS_PER_PASS = 1024  # of each row, so that memory is bounded
_SHOTS_SEED = 1234  # lm-eval's default, for the choice of examples

_NOT_DONE = {  # of transformers' generation: other texts come out of it
    "num_beams",
    "num_return_sequences",
    "penalty_alpha",
    "typical_p",
    "min_p",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "presence_penalty",
    "frequency_penalty",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
}

Request = tuple[Any, list[int], list[int]]  # key in lm-eval's cache, tokens of the context, tokens of the continuation


class LmEvalAdapter(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's model interface for an RWKV model.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: the tokenizer it was trained with.
        batch: requests at once.
        max_length: maximum number of tokens that a prediction sees, like the context of a Transformer; None: all.
        seed: seed of tasks that sample.
        progress: shows how many requests are done; None: nothing is shown.
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
        self.model, self.encoder, self.batch_size, self.max_length, self.seed = (
            model,
            tokenizer,
            batch,
            max_length,
            seed,
        )
        self.max_gen_toks = 256  # lm-eval's default, for tasks without their own
        self._progress = progress or Progress(disable=True)

    @property
    def eot_token_id(self) -> int:
        return self.encoder.end_of_text

    @property
    def tokenizer_name(self) -> str:
        return self.encoder.identity

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        tokens: list[int] = self.encoder.encode(string.encode()).tolist()
        return tokens

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's own.

        Raises:
            UserError: a continuation is empty.
        """
        empty = next((request.args[0] for request in requests if not request.args[1]), None)
        if empty is not None:
            raise UserError(
                f"--tasks: an answer to choose is empty (after {empty[-60:]!r}): any model gives it a probability of 1",
                "correct the data of the task, or its doc_to_choice",
            )
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each complete text, whose first token is predicted from an end-of-text."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            if self.max_length is None:
                pairs = [([self.eot_token_id], tokens)] if tokens else []
            else:
                rolled = utils.get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, 1)
                pairs = [utils.make_disjoint_window(window) for window in rolled]
            windows += [(None, context, continuation) for context, continuation in pairs]
            owners += [number] * len(pairs)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Request], **options: Any) -> list[tuple[float, bool]]:
        """For each request: log-likelihood in nats, and whether greedy decoding gives the continuation."""
        texts, firsts = [], []  # input tokens, and the index of the first one whose target is scored
        for _, context, continuation in requests:
            text = [*context, *continuation]
            text = text if self.max_length is None else text[-(self.max_length + 1) :]
            texts.append(text[:-1])
            firsts.append(max(0, len(text) - len(continuation) - 1))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        bar = self._progress.add_task("scoring", total=len(requests))
        for rows in share_prefixes(self.model, texts, firsts, self.batch_size):
            continuations = [requests[row.number][2] for row in rows]
            for row, result in zip(rows, self._score(rows, texts, continuations), strict=True):
                results[row.number] = result
                key = requests[row.number][0]
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, result)
            self._progress.advance(bar, len(rows))
        self._progress.remove_task(bar)
        return results

    def _score(
        self, rows: Sequence[PrefixedText], texts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Reads the rest of each text and scores its continuation; rows are padded at their ends."""
        device = self.model.emb.weight.device
        width = max(len(texts[row.number]) - row.read for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        targets = torch.full((len(rows), width), IGNORED_TARGET)
        for index, (row, continuation) in enumerate(zip(rows, continuations, strict=True)):
            rest = texts[row.number][row.read :]
            scored = continuation[-len(rest) :]
            tokens[index, : len(rest)] = torch.tensor(rest)
            targets[index, len(rest) - len(scored) : len(rest)] = torch.tensor(scored)
        state: State | None
        state = join_states(self.model, [row.state for row in rows])
        nats, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
        for part, part_targets in zip(
            tokens.split(_TOKENS_PER_PASS, 1), targets.split(_TOKENS_PER_PASS, 1), strict=True
        ):
            scores, state = score(self.model, part.to(device), part_targets.to(device), state)
            nats += scores.nats.double().sum(1).cpu()
            greedy &= scores.greedy.all(1).cpu()
        return [(-float(loss), bool(is_greedy)) for loss, is_greedy in zip(nats, greedy, strict=True)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The generated continuation of each context, up to its stop strings or the end of the text."""
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # numbers of requests with the same settings
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        bar = self._progress.add_task("generating", total=len(requests))
        for numbers in groups.values():
            settings = _settings(requests[numbers[0]].args[1], self.max_gen_toks)
            tokens = int(settings["max_gen_toks"])
            stops = [stop.encode() for stop in settings["until"] if stop]
            sampling = _sampling(settings)
            texts = [self._context(requests[number].args[0], tokens) for number in numbers]
            needs_all_tokens = sampling.repetition_penalty != 1  # the penalty needs every token, not only the state
            limits = [0 if needs_all_tokens else len(text) - 1 for text in texts]
            for rows in share_prefixes(self.model, texts, limits, self.batch_size):
                prompts = [(texts[row.number][row.read :], row.state) for row in rows]
                seeds = [self.seed + numbers[row.number] for row in rows]
                continued = continue_texts(self.model, self.encoder, prompts, tokens, sampling, seeds, stops)
                for row, text in zip(rows, continued, strict=True):
                    number = numbers[row.number]
                    results[number] = text.text.decode(errors="replace")
                    self.cache_hook.add_partial("generate_until", requests[number].args, results[number])
                self._progress.advance(bar, len(rows))
        self._progress.remove_task(bar)
        return results

    def _context(self, context: str, tokens: int) -> list[int]:
        """The tokens of a context (an end-of-text if it is empty), cut on the left to leave room for `tokens` more."""
        text = self.tok_encode(context) or [self.eot_token_id]
        return text if self.max_length is None else text[-max(1, self.max_length - tokens) :]


def _settings(asked: Mapping[str, Any], max_gen_toks: int) -> Mapping[str, Any]:
    """A task's generation_kwargs without those that are null, in lm-eval's normal form.

    Raises:
        UserError: one asks for what is not done here, or is no number.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    for name in _NOT_DONE & given.keys():
        if given[name] not in (0, 1, []):
            raise UserError(
                f"--tasks: generation_kwargs.{name}={given[name]} is not supported", "remove it from the task's YAML"
            )
    try:
        settings: Mapping[str, Any] = normalize_gen_kwargs(given, max_gen_toks)
        _sampling(settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"--tasks: generation_kwargs {given}: {error}", "correct the task's YAML") from None
    return settings


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
    """Finds tasks in your own directories, and among lm-eval's if a name is not there.

    Args:
        names: names of tasks or groups.
        folders: directories with YAML files of your own tasks.

    Raises:
        UserError: a directory or a task does not exist; the nearest name is given.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"--include {folder}: there is no such directory", "give a directory with YAML files of tasks"
            )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = [str(folder) for folder in folders]
    tasks = TaskManager(include_path=paths, include_defaults=False)
    if not all(tasks.match_tasks([name]) for name in names):
        tasks = TaskManager(include_path=paths)  # takes seconds: it reads all of lm-eval's tasks
    for name in names:
        if not tasks.match_tasks([name]):
            near = difflib.get_close_matches(name, tasks.all_tasks, 1)
            hint = f"nearest: {near[0]}; " if near else ""
            raise UserError(
                f"--tasks {name}: there is no such task",
                f"{hint}`lm-eval ls tasks` lists lm-eval's tasks, --include DIRECTORY adds your own",
            )
    return tasks


def run_tasks(
    lm: TemplateLM, names: Sequence[str], tasks: TaskManager, shots: int | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Runs tasks.

    Args:
        lm: the model.
        names: names of the tasks or groups.
        tasks: result of `find_tasks`.
        shots: examples before each question; None: as the task defines.
        limit: maximum number of questions per task; None: all.

    Returns:
        The metrics of each task or group by name.

    Raises:
        UserError: the data of a task cannot be read.
    """
    try:
        loaded = tasks.load(list(names))
    except (ConnectionError, FileNotFoundError, ValueError) as error:  # depends on the version of `datasets`
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--tasks {','.join(names)}: the data of a task cannot be read: {reason}",
            "download the data, or set `dataset_path: json` and `data_files` in the task's YAML for local files",
        ) from None
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        if default is None or (shots is not None and default != 0):  # a task with 0 has no examples to show
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=_SHOTS_SEED)
    evaluation = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=False, verbosity="ERROR")
    results: dict[str, dict[str, Any]] = {}
    for name, metrics in evaluation["results"].items():
        numbers = {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, float | int)}
        results[name] = {key: value for key, value in numbers.items() if "stderr" not in key}
    return results
