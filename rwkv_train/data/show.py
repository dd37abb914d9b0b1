"""A batch in the terminal: what is predicted in colour, what is given dim, where documents begin marked."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from rwkv_train.data.batch import Batch
from rwkv_train.data.rows import IGNORED
from rwkv_train.data.tokenizers import Tokenizer

BORDER = "▌"
_SHOWN = 1200  # tokens of a row


def show_batch(batch: Batch, tokenizer: Tokenizer, console: Console, rows: int = 2) -> None:
    """Prints the first rows of a batch: each target as text, green where it is predicted."""
    tokens, targets, starts = batch.tokens, batch.targets, batch.starts
    predicted = targets != IGNORED
    console.print(
        f"a batch of {len(tokens)} rows of {tokens.shape[1]:,} tokens, {int(predicted.sum()):,} of them predicted "
        f"([green]green[/green]), the others given ([dim]dim[/dim]); {BORDER} a document begins"
        + ("" if starts is None else " and knows nothing of those before it")
    )
    for row in range(min(rows, len(tokens))):
        console.print(f"row {row}: {int(predicted[row].sum()):,} of {tokens.shape[1]:,} predicted", style="bold")
        console.print(_row(tokens[row].tolist(), predicted[row].tolist(), tokenizer))


def _row(tokens: list[int], predicted: list[bool], tokenizer: Tokenizer) -> Text:
    """The tokens of a row; a token is predicted where the place before it says so."""
    text = Text()
    kept = tokens[:_SHOWN]
    flags = [False, *predicted[: len(kept) - 1]]
    begin = 0
    for place in range(1, len(kept) + 1):
        if place < len(kept) and flags[place] == flags[begin] and kept[place] != tokenizer.end_of_text:
            continue
        piece, style = kept[begin:place], "green" if flags[begin] else "dim"
        if piece[0] == tokenizer.end_of_text:
            text.append(BORDER, "bold yellow")
            piece = piece[1:]
        text.append(tokenizer.decode(piece).decode(errors="replace"), style)
        begin = place
    if len(tokens) > _SHOWN:
        text.append(f" … {len(tokens) - _SHOWN:,} more", "dim")
    return text
