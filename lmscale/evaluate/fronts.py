"""Room for trained prompts in a batch: columns of placeholders before the tokens.

Rows may have prompts of different lengths. Where positions travel with the tokens (decoders, encoder-decoders), the room is
as many columns for each row, and what a row does not need is padding at its left; in encoders, whose positions are those of
the columns, a row's prompt begins in the first column, and padding is at its right.

Shapes: b rows, s tokens, k the longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmscale import batch as fields
from lmscale.batch import PADDING_ID

Fields = dict[str, torch.Tensor]


def put_in_front(found: Fields, lengths: Sequence[int], is_encoder_only: bool) -> Fields:
    """Make room for prompts.

    Args:
        found: fields of a batch (lmscale.batch), of the decoder, or of the encoder where there are two stacks: [b, s].
        lengths: of each row's prompt.
        is_encoder_only: the model is a lone encoder.

    Returns:
        The fields with k more columns, and prompt_places. A prompt is of the document whose number is the highest of
        its row, and otherwise like the row's first token.
    """
    tokens = found[fields.TOKENS.name]
    own = torch.tensor(lengths, device=tokens.device)[:, None]
    longest = max(lengths, default=0)
    columns = torch.arange(longest + tokens.size(1), device=tokens.device)[None]
    # The column of a row's first prompt vector.
    start = torch.zeros_like(own) if is_encoder_only else longest - own
    place, token = columns - start, columns - start - own
    is_prompt, is_token = (place >= 0) & (place < own), (token >= 0) & (token < tokens.size(1))
    index = token.clamp(0, tokens.size(1) - 1)
    out = dict(found)
    for name in _COLUMNS & found.keys():
        out[name] = found[name].gather(1, index.expand(len(tokens), -1))
    out[fields.TOKENS.name] = out[fields.TOKENS.name].masked_fill(~is_token, 0)
    if fields.POSITIONS.name in out:
        moved = torch.where(is_token, out[fields.POSITIONS.name] + own, place.clamp(min=0))
        out[fields.POSITIONS.name] = moved
    if fields.DOCUMENT_IDS.name in out:
        # Padding may come first or last in a row, and has the lowest number.
        newest = found[fields.DOCUMENT_IDS.name].amax(dim=1, keepdim=True)
        kept = torch.where(is_token, out[fields.DOCUMENT_IDS.name], newest)
        out[fields.DOCUMENT_IDS.name] = kept.masked_fill(~(is_token | is_prompt), PADDING_ID)
    if fields.MASKED_POSITIONS.name in out:
        out[fields.MASKED_POSITIONS.name] = out[fields.MASKED_POSITIONS.name] + own
    out[fields.PROMPT_PLACES.name] = torch.where(is_prompt, place, -1)
    return out


_COLUMNS = {
    field.name for field in (fields.TOKENS, fields.POSITIONS, fields.DOCUMENT_IDS, fields.TOKEN_TYPES, fields.IS_PREFIX)
}
"""Fields with a column for each token."""
