"""`rwkv-train train|prepare|plan|status|export|…`: the front door of an installed wheel, with train.py's words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rwkv_train import __version__
from rwkv_train.cli import launcher
from rwkv_train.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 where something was found that needs you, 2 for a mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        return launcher.main(argv[1:])
    if argv[:1] == ["plan"]:
        return launcher.plan(argv[1:])
    arguments = None if argv[:1] == ["prepare"] else _parser().parse_args(argv)
    launcher.share_cores()
    try:
        if arguments is None:
            return _prepare(argv[1:])
        if arguments.command == "doctor":
            from rwkv_train.cli.doctor import examine

            return examine(launcher.cores())
        if arguments.command == "status":
            from rwkv_train.rundir.status import status

            return status([Path(run) for run in arguments.runs])
        if arguments.command == "build-ops":
            from rwkv_train.ops.build_cuda import build_ahead

            for library in build_ahead(arguments.arch, arguments.cache):
                print(library)
            return 0
        if arguments.command == "export":
            from rwkv_train.inference.export import export

            print(f"wrote {export(Path(arguments.checkpoint), Path(arguments.target), arguments.dtype)}")
            return 0
        if arguments.command == "eval":
            from rwkv_train.evaluation import eval_command as evaluation

            given = vars(arguments)
            del given["command"]
            return evaluation.run(evaluation.EvalOptions(**given))
        if arguments.command == "report" and arguments.push is not None:
            from rwkv_train.trackers.launch import push_all

            return push_all([Path(run) for run in arguments.runs], arguments.push)
        if arguments.command == "report":
            from rwkv_train.evaluation.report import report_command as report

            given = vars(arguments)
            del given["command"], given["push"]
            return report.run(report.ReportOptions(**given))
        return _generate(arguments)
    except UserError as error:
        launcher.report(error)
        return launcher.MISTAKE
    except BrokenPipeError:  # `… | head` has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print()
        return launcher.INTERRUPTED


def _prepare(argv: Sequence[str]) -> int:
    if argv[:1] == ["show"]:
        return launcher.show(argv[1:])
    from rwkv_train.data.prepare.prepare_command import run

    return run(argv, launcher.cores())


_TOKENIZER = "bytes, world or a tokenizer.json (default: the checkpoint's own, or by the size of the vocabulary)"
_DEVICE = "cpu, cuda, or auto: a GPU if there is one"


def _generate(given: argparse.Namespace) -> int:
    from rwkv_train.inference.generate import run
    from rwkv_train.inference.sampling import Sampling

    sampling = Sampling(given.temperature, given.top_p, given.top_k, given.repetition_penalty)
    words = (given.seed, given.tokenizer, given.stop, given.until_end, given.batch, given.json, given.device)
    return run(given.checkpoint, given.prompt, given.tokens, sampling, *words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("rwkv-train", description="Trains RWKV language models, and uses them.")
    parser.add_argument("--version", action="version", version=f"rwkv-train {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a model: rwkv-train train --help", add_help=False)
    commands.add_parser("prepare", help="make a token store of documents: rwkv-train prepare --help", add_help=False)
    commands.add_parser("plan", help="memory, time and network of a run: rwkv-train plan model=7b …", add_help=False)
    export = commands.add_parser(
        "export",
        help="a checkpoint's weights as one file, or for transformers",
        description="Writes the weights of a checkpoint, sharded or not, without loading more than one parameter.",
    )
    export.add_argument("checkpoint", metavar="CKPT", help="a checkpoint directory, or a .pth file")
    export.add_argument(
        "target", metavar="OUT", help="out.pth or out.safetensors (the field's names), or a directory for transformers"
    )
    export.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as they are)")
    generate = commands.add_parser(
        "generate",
        help="continue a text, step by step",
        description="Continues a text with a trained model, streamed to the terminal.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    generate.add_argument(
        "checkpoint", metavar="CKPT", help="a checkpoint directory or a .pth file with the field's names"
    )
    generate.add_argument("--tokenizer", help=_TOKENIZER)
    generate.add_argument("--prompt", default="", help="the text to go on from")
    generate.add_argument("--tokens", type=int, default=500, help="how many to generate")
    generate.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token each time")
    generate.add_argument("--top-p", type=float, default=0.9, help="share of the probability drawn from, up to 1")
    generate.add_argument("--top-k", type=int, default=0, help="only so many of the likeliest tokens; 0: all")
    generate.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="of tokens that are in the text already; 1: none"
    )
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    generate.add_argument("--until-end", action="store_true", help="an end-of-text ends a text too")
    generate.add_argument("--batch", type=int, default=1, help="how many texts")
    generate.add_argument(
        "--seed", type=int, help="of the draws; the same seed gives the same text (default: another each time)"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object")
    generate.add_argument("--device", default="cpu", help=_DEVICE)
    evaluate = commands.add_parser(
        "eval",
        help="perplexity on stores and text, and lm-eval's tasks",
        description="Perplexity and bits per byte of a checkpoint, by source and by position in the context, and "
        "lm-evaluation-harness's tasks. Without --data and --tasks: on what the checkpoint's run held out.",
    )
    evaluate.add_argument("checkpoint", metavar="CKPT", help="a checkpoint directory, or a .pth file")
    evaluate.add_argument(
        "--data", action="append", default=[], metavar="[NAME=]PATH", help="a store, a text file or a directory"
    )
    evaluate.add_argument("--context", type=int, help="tokens of a window (default: the run's)")
    evaluate.add_argument("--tokens", type=int, help="at most so many of each source, spread over it (default: all)")
    evaluate.add_argument("--tokenizer", help=_TOKENIZER)
    evaluate.add_argument("--tasks", action="append", default=[], metavar="NAME,…", help="of lm-eval, or your own")
    evaluate.add_argument("--include", action="append", default=[], metavar="DIRECTORY", help="of your own tasks")
    evaluate.add_argument("--shots", type=int, help="examples in a prompt (default: as the task says)")
    evaluate.add_argument("--limit", type=int, help="at most so many questions of each task")
    evaluate.add_argument("--max-length", type=int, help="tokens that a task's prediction may see (default: all)")
    evaluate.add_argument("--seed", type=int, default=0, help="of the draws of tasks that sample")
    evaluate.add_argument("--batch", type=int, default=8, help="windows or requests at once; the result is the same")
    evaluate.add_argument("--device", default="auto", help=_DEVICE)
    evaluate.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object")
    evaluate.add_argument("--out", metavar="FILE", help="write that object; RUN/eval.json is shown by `report RUN`")
    report = commands.add_parser(
        "report",
        help="one HTML file with a run's curves, or several runs compared",
        description="Makes one self-contained HTML file of what runs have logged, finished or not.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a run's directory, like runs/NAME")
    report.add_argument("--out", metavar="FILE", help="default: RUN_DIR/report.html, of several runs report.html here")
    report.add_argument("--png", metavar="DIRECTORY", help="draw the charts as pictures too")
    report.add_argument("--live", action="store_true", help="serve the page on this machine, and follow the runs")
    report.add_argument("--port", type=int, default=6008, help="of --live; 0: any free one")
    report.add_argument(
        "--push",
        metavar="TRACKER",
        choices=("wandb", "tensorboard", "csv"),
        help="no page: make a tracker's copy of each run anew, from metrics.jsonl (wandb, tensorboard, csv)",
    )
    commands.add_parser(
        "doctor",
        help="what works on this machine, and what does not and why",
        description="Checks versions, compiler, operator engines and devices. Exit code 1 where something needs you.",
    )
    status = commands.add_parser(
        "status",
        help="how runs get on: their history, and where their time went",
        description="Reads the records of runs: a line for each; of a single one every start, and where time was lost.",
    )
    status.add_argument("runs", metavar="RUN_DIR", nargs="+", help="directories of runs, such as runs/NAME")
    build = commands.add_parser(
        "build-ops",
        help="compile the operators now, not at their first use",
        description="Compiles the C++ and the CUDA engine into the cache, for machines without compiler or time.",
    )
    build.add_argument("--arch", help="compute capabilities of the cards, like 8.0,9.0,10.0 (default: this machine's)")
    build.add_argument("--cache", metavar="DIRECTORY", help="instead of ~/.cache/rwkv_train; RWKV_OPS_CACHE at use")
    return parser


if __name__ == "__main__":
    sys.exit(main())
