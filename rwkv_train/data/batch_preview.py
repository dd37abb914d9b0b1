"""A batch in the terminal: predicted tokens in colour, tokens without a loss dim, starts of documents marked."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from rwkv_train.config import Config
from rwkv_train.console import make_console, visible
from rwkv_train.data.batch import Batch
from rwkv_train.data.batches import Batches
from rwkv_train.data.rows import IGNORED_TARGET
from rwkv_train.data.tokenizers import Tokenizer

BORDER = "▌"
_MAX_TOKENS_SHOWN = 1200  # of a row


def preview(config: Config) -> None:
    """Prints the first batch that a single device would get in this run (`rwkv-train prepare show`).

    Raises:
        UserError: the data cannot be read.
    """
    data = Batches(config.data, config.batch, config.seed, extend=config.vocab.extend)
    console = make_console()
    console.print(data.description)
    show_batch(data.batch(0), data.tokenizer, console)


def show_batch(batch: Batch, tokenizer: Tokenizer, console: Console, rows: int = 2) -> None:
    """Prints the first `rows` rows of a batch as text: green where a token has a loss, dim elsewhere."""
    tokens, targets, starts = batch.tokens, batch.targets, batch.starts
    predicted = targets != IGNORED_TARGET
    console.print(
        f"a batch of {len(tokens)} rows of {tokens.shape[1]:,} tokens: {int(predicted.sum()):,} with a loss "
        f"(green), the others without (dim); {BORDER} start of a document"
        + ("" if starts is None else ", where the state is reset")
    )
    for row in range(min(rows, len(tokens))):
        console.print(
            f"row {row}: {int(predicted[row].sum()):,} of {tokens.shape[1]:,} tokens with a loss", style="bold"
        )
        console.print(_styled_row(tokens[row].tolist(), predicted[row].tolist(), tokenizer, console.is_terminal))


def _styled_row(tokens: list[int], predicted: list[bool], tokenizer: Tokenizer, terminal: bool = False) -> Text:
    """The tokens of a row as styled text.

    Args:
        tokens: input tokens, (T,).
        predicted: whether the target at each position has a loss, (T,): that is input token i + 1.
        tokenizer: that made the tokens.
        terminal: whether control characters are escaped.
    """
    text = Text()
    shown = visible if terminal else str
    kept = tokens[:_MAX_TOKENS_SHOWN]
    has_loss = [False, *predicted[: len(kept) - 1]]
    begin = 0
    for end in range(1, len(kept) + 1):
        if end < len(kept) and has_loss[end] == has_loss[begin] and kept[end] != tokenizer.end_of_text:
            continue
        piece, style = kept[begin:end], "green" if has_loss[begin] else "dim"
        if piece[0] == tokenizer.end_of_text:
            text.append(BORDER, "bold yellow")
            piece = piece[1:]
        text.append(shown(tokenizer.decode(piece).decode(errors="replace")), style)
        begin = end
    if len(tokens) > _MAX_TOKENS_SHOWN:
        text.append(f" … {len(tokens) - _MAX_TOKENS_SHOWN:,} more", "dim")
    return text
