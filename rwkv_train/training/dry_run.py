"""`dry_run=true` and `rwkv-train plan`: all that a run does before its first step, on devices that may be absent."""

from __future__ import annotations

from rwkv_train.config import Config
from rwkv_train.console import make_console
from rwkv_train.data.sources import vocabulary_of
from rwkv_train.errors import UserError
from rwkv_train.exit_codes import ExitCode
from rwkv_train.planning.plan import make_plan, smallest_change, why
from rwkv_train.planning.report import advice, as_json, show
from rwkv_train.planning.resolved import find_devices
from rwkv_train.training.attempt import checkpoint_to_resume
from rwkv_train.training.optim import describe_groups, parameter_groups
from rwkv_train.training.setup import assemble


def plan(config: Config, as_object: bool = False) -> int:
    """Prints a config's plan, without opening its data.

    Args:
        config: with dry_run.
        as_object: whether to print it as JSON on one line, and not as a table.

    Returns:
        the exit code: 0 where it fits, 1 where it does not.
    """
    devices = find_devices(config)
    settled = devices.recorded(config)
    _, vocabulary = vocabulary_of(config.data, config.vocab.extend)
    vocab_size = config.model.vocab_size or vocabulary
    found = make_plan(settled, devices.card, devices.mesh, vocab_size, devices.gpu)
    change = None if found.fits else smallest_change(settled, found, vocab_size)
    if as_object:
        print(as_json(found, settled, change))
    else:
        console = make_console()
        console.print(f"device  {devices.source}")
        if config.strategy == "auto" and found.fits:
            console.print(why(found))
        show(found, settled, change, console)
    return ExitCode.FINISHED if found.fits else ExitCode.NEGATIVE


def dry_run(config: Config) -> int:
    """Composes, builds on the meta device, reads the data, checks the directory, and prints what would happen.

    Raises:
        UserError: what would keep the run from starting.
    """
    if config.callbacks or config.logger:  # Lightning takes seconds to import
        from rwkv_train.training.user_classes import prepare_callbacks, prepare_loggers

        prepare_callbacks(config)
        prepare_loggers(config)
    setup = assemble(config)
    say, data, resolved = setup.console.print, setup.data, setup.resolved
    settled = resolved.recorded(config)
    found = resolved.plan(config, data.vocabulary)
    change = None if found.fits else smallest_change(settled, found, data.vocabulary)
    say(f"device  {resolved.source}")
    say(f"data    {data.description}")
    groups = parameter_groups(setup.model, setup.recipe, config.optim.weight_decay, config.optim.rules)
    for line in describe_groups(groups):
        say(f"group   {line}")
    show(found, settled, change, setup.console)
    setup.directory.refuse_unusable()
    if not found.fits:
        raise UserError(f"model={config.model.size} does not fit", advice(change))
    checkpoint, changed = checkpoint_to_resume(setup)
    where = "at step 0" if checkpoint is None else f"from {checkpoint}" + "".join(f", {change}" for change in changed)
    say(f"would start {where} in {setup.directory.path}, {resolved.mesh.ranks} processes, strategy={resolved.strategy}")
    return ExitCode.FINISHED
