"""Open the tokenizer of any base model, and give it the tokens for units."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from tokenizers import AddedToken

from usdm_sft.template.config import OFFLINE
from usdm_sft.template.special_tokens import (
    CONTINUE_TOKEN,
    CORRESPOND_TOKEN,
    find_newline,
    naming_errors,
    plain_copy,
    read_tokens,
    unit_token,
)
from usdm_sft.utils.texts import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"


def open_tokenizer(
    name_or_path: str | Path,
    subfolder: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    repo_type: str = "model",
) -> PreTrainedTokenizerFast:
    """Open tokenizer.json as it is; arguments as of `load_tokenizer`.

    Raises:
        OSError: The tokenizer cannot be found or downloaded.
        ValueError: The tokenizer cannot be opened.
    """
    hub = {"cache_dir": cache_dir, "revision": revision, "token": token, "repo_type": repo_type}
    _require_tokenizer_json(str(name_or_path), subfolder, hub)
    from transformers import PreTrainedTokenizerFast

    place = f"{name_or_path}/{subfolder}" if subfolder else str(name_or_path)
    try:
        with naming_errors(place):
            tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
                _find_folder(str(name_or_path), subfolder, hub),
                cache_dir=cache_dir,
                revision=revision or "main",
                token=token,
            )
    except OSError:
        raise
    except Exception as error:  # transformers and tokenizers raise many types for a malformed file
        raise ValueError(
            f"{place} has a tokenizer that cannot be opened ({first_line(error)}): download it again, "
            f"or use {OFFLINE!r}"
        ) from error
    return tokenizer


def _require_tokenizer_json(name_or_path: str, subfolder: str | None, hub: dict[str, Any]) -> None:
    """Refuse a source without tokenizer.json, for which transformers would convert other files, to other ids."""
    if Path(name_or_path).is_dir():
        if not (folder := Path(name_or_path, subfolder or "")).joinpath("tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json: name a folder with a fast tokenizer")
        return
    try:
        hf_hub_download(name_or_path, "tokenizer.json", subfolder=subfolder, **hub)
    except (OSError, HFValidationError) as error:
        raise OSError(
            f"tokenizer {name_or_path} is not a folder and cannot be fetched from the Hub ({first_line(error)}): check the "
            f"name and the network, or use {OFFLINE!r}, which is built offline"
        ) from error


def _find_folder(name_or_path: str, subfolder: str | None, hub: dict[str, Any]) -> str:
    """Return what transformers opens: a folder, or the name of a model repository. It has no names for dataset repositories."""
    if Path(name_or_path).is_dir():
        return str(Path(name_or_path, subfolder or ""))
    if subfolder is None and hub["repo_type"] == "model":
        return name_or_path
    files = [f"{subfolder}/{name}" if subfolder else name for name in ("*.json", "chat_template.jinja")]
    return str(Path(snapshot_download(name_or_path, allow_patterns=files, **hub), subfolder or ""))


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
