"""Give the tokenizer of any base model the tokens for units."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken

from usdm_sft.template.tokens import CONTINUE_TOKEN, CORRESPOND_TOKEN, find_newline, plain_copy, read_tokens, unit_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"


def add_units(tokenizer: PreTrainedTokenizerFast, num_units: int, name: str) -> PreTrainedTokenizerFast:
    """Add `<|correspond|>`, `<|continue|>`, `<|unit0|>`, `<|unit1|>`, ... to a tokenizer, in place.

    The new tokens get the ids after the tokenizer's own, units last. A tokenizer without a padding token gets `<pad>` before them, and
    one in which a newline is not one id, as in WordPiece, a token for it.

    Args:
        tokenizer: The tokenizer of a base model.
        num_units: Number of units.
        name: Its name in error messages.

    Raises:
        ValueError: The tokenizer has one of the new tokens already, or does not read them as one id each.
    """
    new = [CORRESPOND_TOKEN, CONTINUE_TOKEN, *map(unit_token, range(num_units))]
    for token in new[:3]:
        if (found := tokenizer.backend_tokenizer.token_to_id(token)) is not None:
            raise ValueError(f"{name} has the token {token} already (id {found}): name the tokenizer of a base model")
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, normalized=False, special=True)})
    if find_newline(plain_copy(tokenizer.backend_tokenizer)) is None:
        tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in new], special_tokens=True)
    read_tokens(tokenizer, name)
    return tokenizer
