"""`dry_run=true` and `rwkv-train plan`: all that a run does before its first step, on devices that need not be here."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rwkv_train.checkpoint.directory import newest
from rwkv_train.config import Config
from rwkv_train.data.sources import find_tokenizer, stores_of
from rwkv_train.errors import UserError
from rwkv_train.planning.cards import card_of, ranks_of, with_precision
from rwkv_train.planning.plan import Plan, make_plan, smallest_change, why
from rwkv_train.planning.report import advice, as_json, show
from rwkv_train.training.optim import describe_groups, parameter_groups
from rwkv_train.training.setup import assemble, check_checkpoint


def plan(config: Config, as_object: bool = False) -> int:
    """Prints a config's plan, for people or as JSON; the exit code is 0 where it fits and 1 where it does not."""
    console = Console(highlight=False, soft_wrap=True)
    config = with_precision(config, card_of(config)[0].name != "cpu")
    found, change, told = _plan(config)
    if as_object:
        print(as_json(found, config, change))
        return 0 if found.fits else 1
    console.print(f"device  {told}")
    if config.strategy == "auto" and found.fits:
        console.print(why(found))
    show(found, config, change, console)
    return 0 if found.fits else 1


def dry_run(config: Config) -> int:
    """Composes, builds on the meta device, reads the data, looks at the directory, and says what would happen.

    Raises:
        UserError: what would keep the run from starting.
    """
    setup = assemble(config)
    config = setup.config
    say, data, split = setup.console.print, setup.data, setup.data.split
    found, change, told = _plan(config)
    say(f"device  {told}")
    say(f"data    {data.description}")
    for line in describe_groups(
        parameter_groups(setup.model, setup.recipe, config.optim.weight_decay, config.optim.rules)
    ):
        say(f"group   {line}")
    show(found, config, change, setup.console)
    setup.directory.refuse_unusable()
    if not found.fits:
        raise UserError(f"model={config.model.size} does not fit", advice(change))
    checkpoint = None
    if config.resume == "auto":
        checkpoint, _ = newest(setup.directory.checkpoints, content=False)
        if checkpoint is not None:
            check_checkpoint(checkpoint, setup)
    elif config.resume != "never":
        checkpoint = Path(config.resume)
    where = "at step 0" if checkpoint is None else f"from {checkpoint}"
    say(f"would start {where} in {setup.directory.path}, {split.ranks} processes, strategy={setup.strategy}")
    return 0


def _plan(config: Config) -> tuple[Plan, tuple[str, Plan] | None, str]:
    card, told = card_of(config)
    tokenizer = find_tokenizer(config.data, config.vocab.extend, stores_of(config.data))
    vocabulary = config.model.vocab_size or tokenizer.vocab_size
    found = make_plan(config, card, ranks_of(config, card), vocabulary, gpu=card.name != "cpu")
    return found, None if found.fits else smallest_change(config, found, vocabulary), told
