"""The commands of `rwkv-train`: one table of name, help, arguments and what runs. Imports are made when it runs.

To add a command: a function that runs it, one that adds its arguments, and a row in COMMANDS.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rwkv_train import resources
from rwkv_train.cli import launcher
from rwkv_train.user_path import user_path, utf8_path

TOKENIZER = "bytes, world or a tokenizer.json (default: that of the checkpoint, or by the size of its vocabulary)"
CHECKPOINT = "a run or checkpoint directory, or a .pth or .safetensors file with the field's parameter names"


@dataclass(frozen=True)
class Command:
    """A command of `rwkv-train`.

    Args:
        summary: its line in `rwkv-train --help`.
        run: takes the parsed arguments, or the command line where there are no arguments; returns the exit code.
        add_arguments: adds the arguments to a parser; None: `run` parses the command line, because it takes settings.
        description: the first sentences of its own help.
        examples: command lines, without `rwkv-train`, the first things that its help shows.
        synopsis: its positional arguments, for the usage line.
    """

    summary: str
    run: Callable[[Any], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None
    description: str = ""
    examples: Sequence[str] = ()
    synopsis: str = ""

    def parser(self, name: str) -> argparse.ArgumentParser:
        """The parser of the command's own arguments."""
        examples = "".join(f"\n  rwkv-train {example}" for example in self.examples)
        parser = argparse.ArgumentParser(
            f"rwkv-train {name}",
            usage=f"rwkv-train {name} [options] {self.synopsis}".rstrip(),
            description=f"{self.description}\n\nexamples:{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if self.add_arguments is not None:
            self.add_arguments(parser)
        return parser

    def __call__(self, name: str, argv: Sequence[str]) -> int:
        """Parses the arguments and runs the command."""
        return self.run(argv if self.add_arguments is None else self.parser(name).parse_args(argv))


def _prepare(argv: Sequence[str]) -> int:
    if argv[:1] == ["show"]:
        return launcher.show(argv[1:])
    from rwkv_train.data.prepare.prepare_command import run

    return run(argv, resources.cpu_cores())


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", help="a run directory, such as runs/NAME")


def _status(given: argparse.Namespace) -> int:
    from rwkv_train.rundir.status import status

    return status([Path(run) for run in given.runs])


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT)
    parser.add_argument(
        "target", metavar="OUT", help="OUT.pth or OUT.safetensors (the field's names), or a directory for transformers"
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: unchanged)")


def _export(given: argparse.Namespace) -> int:
    from rwkv_train.inference.export import export

    print(f"wrote {export(user_path(given.checkpoint), utf8_path(given.target), given.dtype)}")
    return 0


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help=CHECKPOINT)
    add("--prompt", metavar="TEXT", default="", help="text that is continued (default: none)")
    add("--tokens", metavar="N", type=int, default=500, help="maximum number of tokens to generate (default: 500)")
    add("--temperature", metavar="X", type=float, default=1.0, help="0: always the most likely token (default: 1)")
    add("--top-p", metavar="X", type=float, default=0.9, help="draw from this share of the probability (default: 0.9)")
    add("--top-k", metavar="N", type=int, default=0, help="draw from the N most likely tokens; 0: from all (default)")
    add(
        "--repetition-penalty",
        metavar="X",
        type=float,
        default=1.0,
        help="penalty on tokens that were read or generated before; 1: none (default)",
    )
    add("--stop", dest="stops", metavar="TEXT", action="append", default=[], help="stop at this text; may be repeated")
    add("--until-end", action="store_true", help="stop at an end-of-text token too")
    add("--batch", metavar="N", type=int, default=1, help="number of texts (default: 1)")
    add("--seed", metavar="N", type=int, help="random seed; the same seed gives the same text (default: a random one)")
    add("--tokenizer", metavar="NAME", help=TOKENIZER)
    add("--device", metavar="NAME", default="cpu", help="cpu (default), cuda, or auto: a GPU if there is one")
    add("--json", dest="as_json", action="store_true", help="print one JSON object")


def _generate(given: argparse.Namespace) -> int:
    from rwkv_train.inference import generate
    from rwkv_train.inference.sampling import Sampling

    options = vars(given)
    sampling = Sampling(**{field.name: options.pop(field.name) for field in fields(Sampling)})
    return generate.run(generate.GenerateOptions(sampling=sampling, **options))


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help=CHECKPOINT)
    add("--data", action="append", default=[], metavar="[NAME=]PATH", help="a store, a text file or a directory")
    add("--context", metavar="N", type=int, help="tokens of a window (default: that of the run)")
    add("--tokens", metavar="N", type=int, help="maximum number of tokens of each source, in windows spread over it")
    add("--tokenizer", metavar="NAME", help=TOKENIZER)
    add("--tasks", action="append", default=[], metavar="NAME,…", help="tasks of lm-eval, or your own")
    add("--include", action="append", default=[], metavar="DIRECTORY", help="a directory with your own tasks")
    add("--shots", metavar="N", type=int, help="examples in a prompt (default: as the task defines)")
    add("--limit", metavar="N", type=int, help="maximum number of questions of each task")
    add("--max-length", metavar="N", type=int, help="maximum number of tokens that a task's prediction sees")
    add("--seed", metavar="N", type=int, default=0, help="random seed of tasks that sample (default: 0)")
    add("--batch", metavar="N", type=int, default=8, help="windows or requests at a time (default: 8)")
    add("--device", metavar="NAME", default="auto", help="cpu, cuda, or auto: a GPU if there is one (default)")
    add("--json", dest="as_json", action="store_true", help="print one JSON object")
    add("--out", metavar="FILE", help="write that object to a file; `report RUN` shows RUN/eval.json")


def _eval(given: argparse.Namespace) -> int:
    from rwkv_train.evaluation import eval_command

    return eval_command.run(eval_command.EvalOptions(**vars(given)))


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_DIR", help="a run directory, such as runs/NAME")
    add("--out", metavar="FILE", help="the HTML file (default: RUN_DIR/report.html; of several runs ./report.html)")
    add("--png", metavar="DIRECTORY", help="draw the charts as pictures too")
    add("--live", action="store_true", help="serve the page on this machine and follow the runs")
    add("--port", metavar="N", type=int, default=6008, help="port of --live (default: 6008); 0: any free one")
    add(
        "--push",
        metavar="TRACKER",
        choices=("wandb", "tensorboard", "csv"),
        help="instead of a page, rebuild the runs in a tracker from metrics.jsonl: wandb, tensorboard or csv",
    )


def _report(given: argparse.Namespace) -> int:
    if given.push is not None:
        from rwkv_train.trackers.launch import push_all

        return push_all([user_path(run) for run in given.runs], given.push)
    from rwkv_train.evaluation.report import report_command

    del given.push
    return report_command.run(report_command.ReportOptions(**vars(given)))


def _doctor(given: argparse.Namespace) -> int:
    from rwkv_train.cli.doctor import examine

    return examine(resources.cpu_cores())


def _build_ops_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", help="compute capabilities of the GPUs, such as 8.0,9.0,10.0 (default: those of this machine)"
    )
    parser.add_argument(
        "--cache",
        metavar="DIRECTORY",
        help="where to put the libraries (default: ~/.cache/rwkv_train); set RWKV_OPS_CACHE to use them from there",
    )


def _build_ops(given: argparse.Namespace) -> int:
    from rwkv_train.ops.families import build_ahead

    for library in build_ahead(given.arch, given.cache):
        print(library)
    return 0


COMMANDS: dict[str, Command] = {
    # the functions of the launcher are looked up at the call, so that tests can replace them
    "train": Command("train a model, like python train.py", lambda argv: launcher.main(argv)),
    "prepare": Command("make a token store from documents", _prepare),
    "plan": Command("estimate memory, time and network traffic of a run", lambda argv: launcher.plan(argv)),
    "status": Command(
        "show the progress and history of runs",
        _status,
        _status_arguments,
        "Prints one line per run; for a single run also every attempt, and where its time went.",
        ["status runs/NAME", "status runs/*"],
        "RUN_DIR…",
    ),
    "report": Command(
        "write an HTML file with the curves of one run or several",
        _report,
        _report_arguments,
        "Writes one self-contained HTML file with what runs have logged, whether they are finished or not.",
        ["report runs/NAME", "report runs/NAME runs/OTHER --out compare.html", "report runs/NAME --live"],
        "RUN_DIR…",
    ),
    "generate": Command(
        "continue a text with a model",
        _generate,
        _generate_arguments,
        "Continues a text with a trained model; a single text is streamed to the terminal.",
        [
            "generate runs/NAME/weights.pth --prompt 'def '",
            "generate model.pth --tokenizer world --top-k 40 --stop 'User:' --batch 4 --json",
        ],
        "CKPT",
    ),
    "eval": Command(
        "measure perplexity on text, or run tasks of lm-eval",
        _eval,
        _eval_arguments,
        "Measures perplexity and bits per byte of a checkpoint, by source and by position in the context, and runs\n"
        "tasks of lm-evaluation-harness. Without --data and --tasks: the validation of the run.",
        ["eval runs/NAME/weights.pth", "eval model.pth --data books=~/books --data wiki=stores/wiki --tasks lambada"],
        "CKPT",
    ),
    "export": Command(
        "write the weights of a checkpoint as one file, or for transformers",
        _export,
        _export_arguments,
        "Writes the weights of a checkpoint, sharded or not; holds only one parameter in memory at a time.",
        ["export runs/NAME/checkpoints/step_000004000-0001 model.safetensors --dtype bfloat16", "export model.pth hf/"],
        "CKPT OUT",
    ),
    "doctor": Command(
        "check what works on this machine",
        _doctor,
        lambda parser: None,
        "Checks versions, the compiler, the operator engines and the devices. Exit code 1: a problem needs attention.",
        ["doctor"],
    ),
    "build-ops": Command(
        "compile the operators ahead of their first use",
        _build_ops,
        _build_ops_arguments,
        "Compiles the C++ and the CUDA engine into the cache, for machines without a compiler.",
        ["build-ops", "build-ops --arch 8.0,9.0 --cache ops/"],
    ),
}
