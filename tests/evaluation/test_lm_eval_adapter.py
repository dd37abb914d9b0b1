"""lm-eval on our model, against its own adapter for transformers with the same weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_train.cli import main as cli
from rwkv_train.data.tokenizers import ByteTokenizer
from rwkv_train.errors import UserError
from rwkv_train.evaluation import lm_eval_adapter, prefixes
from rwkv_train.evaluation.lm_eval_adapter import LmEvalAdapter, find_tasks, run_tasks
from rwkv_train.inference.export import export
from rwkv_train.models import LanguageModel
from tests.evaluation.tasks import write_tasks
from tests.oracles.models import lively_model

MAX_LENGTH = 1024  # what transformers' model has

TEXTS = ["a", "def f(x):\n    return x\n", "to be or not to be, that is the question " * 3, "déjà vu 你好", "x" * 300]
PAIRS = [
    ("", "to be"),
    ("to be or not", " to be"),
    ("to be or not ", "to go"),  # the blank goes over to what follows
    *[
        ("Q: which is it? " * 5 + f"{number}\nA:", f" {choice}")
        for number in range(3)
        for choice in ("yes", "no", "n", "")
    ],
    ("y" * 1100, "z" * 20),  # longer than transformers' model takes
]


class Request:
    """The part of an lm-eval request that the adapter uses."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def requests_of(pairs: Sequence[Sequence[Any]]) -> list[Request]:
    return [Request(*pair) for pair in pairs]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return lively_model(vocab_size=256).eval()


@pytest.fixture(scope="module")
def exported(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    torch.save(model.state_dict(), folder / "weights.pth")
    export(folder / "weights.pth", folder / "exported")
    return folder / "exported"


@pytest.fixture(scope="module")
def theirs(exported: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(exported), device="cpu", dtype="float32", batch_size=1, max_length=MAX_LENGTH)


def ours(model: LanguageModel, batch: int, **arguments: Any) -> LmEvalAdapter:
    return LmEvalAdapter(model, ByteTokenizer(), batch, **arguments)


def close(found: Sequence[float], wanted: Sequence[float]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_loglikelihoods_are_those_of_transformers(model: LanguageModel, theirs: Any, batch: int) -> None:
    found = ours(model, batch, max_length=MAX_LENGTH).loglikelihood(requests_of(PAIRS))
    wanted = theirs.loglikelihood(requests_of(PAIRS), disable_tqdm=True)
    close([nats for nats, _ in found], [nats for nats, _ in wanted])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("max_length", [64, MAX_LENGTH])
def test_rolling_loglikelihoods_are_those_of_transformers(
    model: LanguageModel, exported: Path, batch: int, max_length: int
) -> None:
    """Compared with HFLM without its cache of logits, which takes equal windows of unequal contexts for one."""
    from lm_eval.models.huggingface import HFLM

    arguments = {"device": "cpu", "dtype": "float32", "logits_cache": False}
    theirs = HFLM(str(exported), batch_size=4, max_length=max_length, **arguments)
    texts = requests_of([(text,) for text in TEXTS])
    close(
        ours(model, batch, max_length=max_length).loglikelihood_rolling(texts),
        theirs.loglikelihood_rolling(texts, disable_tqdm=True),
    )


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_generation_is_that_of_transformers_one_by_one(model: LanguageModel, theirs: Any, batch: int) -> None:
    settings = {"until": ["e", "\n\n"], "max_gen_toks": 40, "do_sample": False}
    other = {"until": [], "max_gen_toks": 7}
    requests = requests_of([(text, settings) for text in TEXTS] + [(text, other) for text in TEXTS[:3]])
    assert ours(model, batch).generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_the_length_of_a_text_is_unlimited(model: LanguageModel) -> None:
    """Without a max_length the complete text is the context: the result is the model's own loss."""
    text = "to be or not to be " * 150
    (found,) = ours(model, 2).loglikelihood_rolling(requests_of([(text,)]))
    tokens = torch.tensor([[0, *text.encode()]])
    with torch.no_grad():
        logits, _ = model(tokens[:, :-1])
    wanted = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None]).double().sum()
    close([found], [float(wanted)])


def test_an_empty_text_costs_nothing(model: LanguageModel) -> None:
    assert ours(model, 2).loglikelihood_rolling(requests_of([("",)])) == [0.0]


def test_shared_prefixes_are_read_once(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("few shots " * 50 + f"question {number}", f" {answer}") for number in range(8) for answer in "abcd"]
    read = {"tokens": 0}
    forward = model.forward

    def counted(tokens: torch.Tensor, *rest: Any) -> Any:
        read["tokens"] += tokens.numel()
        return forward(tokens, *rest)

    def cost() -> tuple[list[float], int]:
        read["tokens"] = 0
        found = [nats for nats, _ in ours(model, 8).loglikelihood(requests_of(pairs))]
        return found, read["tokens"]

    monkeypatch.setattr(model, "forward", counted)
    shared, few = cost()
    monkeypatch.setattr(prefixes, "MIN_TOKENS_SAVED", 10**9)
    alone, many = cost()
    close(shared, alone)
    assert many > 32 * 500
    assert few < 500 + 32 * 30, "the few shots once, the rest of each"


def test_sampling_does_not_depend_on_the_batch(model: LanguageModel) -> None:
    settings = {"until": ["e"], "max_gen_toks": 30, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 50}
    penalised = {**settings, "repetition_penalty": 1.3}
    requests = requests_of([(text, kind) for kind in (settings, penalised) for text in [*TEXTS, *TEXTS]])
    one, many = (ours(model, batch, seed=7).generate_until(requests) for batch in (1, 6))
    assert one == many
    assert len(set(one)) > 10
    assert ours(model, 6, seed=8).generate_until(requests) != many


def test_tasks_made_here_score_as_with_transformers(model: LanguageModel, theirs: Any, tmp_path: Path) -> None:
    names = write_tasks(tmp_path)
    tasks = find_tasks(names, [tmp_path])
    found = run_tasks(ours(model, 5, max_length=MAX_LENGTH), names, tasks, None, None)
    wanted = run_tasks(theirs, names, tasks, None, None)
    assert found.keys() == wanted.keys() == set(names)
    for name in names:
        assert found[name].keys() == wanted[name].keys()
        assert found[name] == pytest.approx(wanted[name], rel=1e-4)
    assert {"acc", "acc_norm"} <= found["our_choice"].keys()
    assert "bits_per_byte" in found["our_rolling"]


def test_the_command_runs_tasks(model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tasks(tmp_path, 4)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    arguments = ["eval", str(tmp_path / "weights.pth"), "--tasks", "our_choice,our_until", "--include", str(tmp_path)]
    assert cli.main([*arguments, "--limit", "2", "--shots", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["tasks"]) == {"our_choice", "our_until"}
    assert "sources" not in printed
    assert cli.main([*arguments, "--limit", "2"]) == 0
    assert "acc_norm" in capsys.readouterr().out


def test_error_messages(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    write_tasks(tmp_path, 2)
    monkeypatch.setattr(
        lm_eval_adapter, "TaskManager", lambda include_path, **_: TaskManager(None, include_path, False)
    )
    with pytest.raises(UserError, match=r"--tasks our_choise: there is no such task\n  nearest: our_choice; `lm-"):
        find_tasks(["our_until", "our_choise"], [tmp_path])
    with pytest.raises(UserError, match=r"--include .*nowhere: there is no such directory"):
        find_tasks(["our_choice"], [tmp_path / "nowhere"])
    (tmp_path / "documents.jsonl").unlink()
    with pytest.raises(UserError, match="the data of a task cannot be read"):
        run_tasks(ours(model, 2), ["our_until"], find_tasks(["our_until"], [tmp_path]), None, None)


@pytest.mark.slow  # reading lm-eval's fourteen thousand tasks
def test_tasks_of_lm_eval_are_known() -> None:
    assert find_tasks(["lambada_openai"], [])
    with pytest.raises(UserError, match=r"--tasks lambada_opena: there is no such task\n  nearest: lambada_openai;"):
        find_tasks(["lambada_opena"], [])


def test_null_settings_are_those_that_are_not_given(model: LanguageModel) -> None:
    settings = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    null = {**settings, "temperature": None, "top_p": None, "num_beams": 1, "repetition_penalty": None}
    found, wanted = (ours(model, 2).generate_until(requests_of([("a", given)])) for given in (null, settings))
    assert found == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs.num_beams=4 is not supported\n  remove it"),
        ({"temperature": "hot", "do_sample": True}, "generation_kwargs .*could not convert string to float: 'hot'"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(model: LanguageModel, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ours(model, 2).generate_until(requests_of([("a", {"until": ["e"], "max_gen_toks": 3, **given})]))


@pytest.mark.parametrize("context", ["Q: which?", ""])
def test_an_empty_choice_is_refused(model: LanguageModel, context: str) -> None:
    with pytest.raises(UserError, match=r"an answer to choose is empty .*a probability of 1"):
        ours(model, 2).loglikelihood(requests_of([(context, " yes"), (context, "")]))
