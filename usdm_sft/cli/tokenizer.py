"""The command `tokenizer`."""

from __future__ import annotations


def tokenizer(base: str, tokenizer_dir: str, num_units: int = 10_000) -> None:
    """Give the tokenizer of a base model the tokens for units.

    Prepare with this folder and --template.tokenization separate, or chat for a chat model. The page "Other base models" of the documentation shows how the
    embeddings of the model grow.

    Examples:
        dailytalk-usdm tokenizer Qwen/Qwen3-0.6B qwen-units --num_units 10000

    Args:
        base: A folder or a Hub repository with a tokenizer.json.
        tokenizer_dir: The folder to make; AutoTokenizer of transformers 4.57 and 5 opens it.
        num_units: Number of units of the unit model.
    """
    from pathlib import Path

    from usdm_sft.template.tokenizer import build_tokenizer, save_tokenizer
    from usdm_sft.utils.files import SUFFIX, remove_path, replace_path

    folder = Path(tokenizer_dir).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{tokenizer_dir} is not empty: name a new folder")
    built = build_tokenizer(base, num_units)
    unfinished = folder.with_name(folder.name + SUFFIX)
    remove_path(unfinished)
    save_tokenizer(built, unfinished)
    replace_path(unfinished, folder)
    first, last = (built.convert_tokens_to_ids(f"<|unit{unit}|>") for unit in (0, num_units - 1))
    print(f"{tokenizer_dir} has {len(built):,} tokens; units have the ids {first} to {last}")
