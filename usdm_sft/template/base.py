"""Give the tokenizer of any base model the tokens for units, and save it for every version of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken

from usdm_sft.template.tokens import CONTINUE_TOKEN, CORRESPOND_TOKEN, find_newline, plain_copy, read_tokens, unit_token
from usdm_sft.utils.atomic import replace_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"  # noqa: S105 - a token of the vocabulary


def add_units(tokenizer: PreTrainedTokenizerFast, num_units: int, name: str) -> PreTrainedTokenizerFast:
    """Add `<|correspond|>`, `<|continue|>`, `<|unit0|>`, `<|unit1|>`, ... to a tokenizer, in place.

    The new tokens get the ids after the tokenizer's own. A tokenizer without a padding token gets `<pad>`; one in which a newline
    is not one id, as in WordPiece, gets a token for it.

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
        new.append(PAD_TOKEN)
        tokenizer.pad_token = PAD_TOKEN
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in new], special_tokens=True)
    if find_newline(plain_copy(tokenizer.backend_tokenizer)) is None:
        tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    read_tokens(tokenizer, name)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Save a tokenizer so that `AutoTokenizer` of transformers 4 and 5 reads tokenizer.json as it is.

    transformers 5 writes a name of the class, and a list of tokens, that transformers 4 cannot read.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    replace_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
