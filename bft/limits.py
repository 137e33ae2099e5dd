"""Whether a model can take the records that a tokenizer made for it.

Otherwise an index would be out of range, which on a GPU ends the process.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from bft.data import Collator
from bft.encode import DataError, Example

# GPT-2's wpe, OPT's embed_positions, OpenAI-GPT's positions_embed, Bert's position_embeddings, ...
_POSITION_TABLE = re.compile(r"(^|\.)(wpe|\w*pos(ition)?s?(_\w+)?)(\.weight)?$")
# Rows in front of the first position's, as OPT's two.
_MAX_OFFSET = 8


def check_fits(examples: Iterable[Example], model: Any, tokenizer: Any) -> None:
    """Raises DataError for the first example that has a token or a position unknown to `model`."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    # Tokens that the model can both read and write.
    tokens = min(int(layer.weight.shape[0]) for layer in layers if layer is not None)
    pad = Collator.of(tokenizer).pad_token_id
    if pad >= tokens:
        raise DataError(
            f"the tokenizer's padding token has the id {pad}, expected one below {tokens}, the "
            f"rows of the model's embedding; {_WAY_OUT}"
        )
    table = position_table(model)
    for example in examples:
        largest, length = max(example.input_ids), len(example.input_ids)
        if largest >= tokens:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"{example.where}: token {token!r} has the id {largest}, expected ids below "
                f"{tokens}, the rows of the model's embedding; {_WAY_OUT}"
            )
        if table is not None and length > table.positions:
            ends = f"the model's table of positions ({table.name}) ends at {table.positions}"
            raise DataError(
                f"{example.where}: {length} tokens, and {ends}; expected max_length to be at most "
                f"{table.positions}"
            )


_WAY_OUT = (
    "use the tokenizer that the model was trained with, or first resize the model: "
    "model.resize_token_embeddings(len(tokenizer)), and save both"
)


class PositionTable(NamedTuple):
    """The parameter or buffer that a model looks its positions up in."""

    positions: int
    name: str


def position_table(model: Any) -> PositionTable | None:
    """The model's table of positions, by its name and size; None where positions are computed."""
    wanted = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(wanted, int):
        return None
    found = []
    for path, table in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not _POSITION_TABLE.search(path) or table.dim() != 2:
            continue
        if wanted <= table.shape[0] <= wanted + _MAX_OFFSET:
            # Roberta counts from the row behind the padding's.
            padding = getattr(model.get_submodule(path.rpartition(".")[0]), "padding_idx", None)
            skipped = 0 if padding is None else padding + 1
            found.append(PositionTable(min(wanted, table.shape[0] - skipped), path))
    return min(found, default=None)
