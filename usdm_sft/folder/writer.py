"""Write a dataset folder. It is complete as soon as it has counts.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.corpus.examples import CONFIGS
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.folder.card import make_card
from usdm_sft.folder.example_picture import draw_example, read_example
from usdm_sft.folder.layout import COUNTS, PICTURES, UNFINISHED, open_unfinished, read_columns, read_counts, read_layout
from usdm_sft.folder.own_parts import CARD, EMPTY_CARD, Card, fill_in, plain_digest, read_card
from usdm_sft.folder.parquet import write_parquet, write_utterances
from usdm_sft.folder.pictures import draw_pictures
from usdm_sft.template.tokenizer import save_tokenizer
from usdm_sft.utils.files import remove_path, replace_path, replace_text, sha256_file, sync_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from usdm_sft.folder.parquet import SplitRows, SplitUtterances
    from usdm_sft.utils.pool import Pool


def write_folder(
    folder: Path,
    config_name: str,
    splits: Mapping[str, SplitRows],
    tokenizer: PreTrainedTokenizerFast,
    counts: dict[str, Any],
    pool: Pool,
    *,
    key: str,
    num_output_shards: int | None = None,
    utterances: Mapping[str, SplitUtterances] | None = None,
    card_options: Card = EMPTY_CARD,
    cards: Sequence[str] = (),
) -> dict[str, Any]:
    """Write all files into a hidden folder inside the output folder, then move them into place, counts.json last.

    Args:
        folder: The output folder. Its entries with the names of a dataset folder are replaced, others stay. The caller holds its
            lock.
        config_name: Name of the config, such as "single_turn", and of the folder of the Parquet files.
        splits: The finished rows.
        tokenizer: The tokenizer to save in `tokenizer/`.
        counts: The counts so far; statistics and digests of the files are added.
        pool: Shares out the Parquet files.
        key: Key of all rows. Parquet files of an interrupted run that had the same key are kept, if the pool finds them.
        num_output_shards: As in `write_parquet`.
        utterances: The config `utterances` by split, if the folder keeps the audio.
        card_options: What the publisher says in the card; the publisher's own parts of an earlier card stay.
        cards: Other cards whose own parts are kept, where the earlier one does not have them.

    Returns:
        The counts as written.
    """
    unfinished = open_unfinished(folder, key, (config_name, UTTERANCES) if utterances else (config_name,))
    layout, backend = read_layout(folder / COUNTS, counts), tokenizer.backend_tokenizer
    written = write_parquet(unfinished / config_name, splits, num_output_shards, layout, pool, key=key)
    files = {split: list(each.digests) for split, each in written.items()}
    digests = {path: sha256 for each in written.values() for path, sha256 in each.digests.items()}
    statistics = {split: each.statistics for split, each in written.items()}
    counts = counts | {"statistics": {split: values.summary() for split, values in statistics.items()}}
    save_tokenizer(tokenizer, unfinished / "tokenizer")
    draw_pictures(statistics, counts, unfinished / PICTURES)
    draw_example(read_example(files), backend, unfinished / PICTURES, layout)
    other_info = []
    if utterances is not None:
        columns = read_columns(counts["settings"])
        counts[UTTERANCES], info, found = write_utterances(
            unfinished / UTTERANCES, utterances, pool, key=key, columns=columns
        )
        other_info, digests = [info], digests | found
    counts["files"] = {path.relative_to(unfinished).as_posix(): sha256 for path, sha256 in digests.items()}
    num_bytes = {split: each.num_bytes for split, each in written.items()}
    card = make_card(config_name, num_bytes, counts, files, backend, other_info)
    digests[unfinished / CARD] = plain_digest(card, counts["corpus"])
    earlier = [read_card(folder / CARD)] if (folder / CARD).is_file() else []
    (unfinished / CARD).write_text(fill_in(card, card_options, *earlier, *cards), encoding="utf-8")
    names = {path.relative_to(unfinished).as_posix(): path for path in unfinished.rglob("*") if path.is_file()}
    counts["files"] = {name: digests.get(path) or sha256_file(path) for name, path in sorted(names.items())}
    replace_text(unfinished / COUNTS, json.dumps(counts, indent=2, ensure_ascii=False) + "\n")
    _move_into_place(unfinished, folder)
    return counts


def _move_into_place(unfinished: Path, folder: Path) -> None:
    """Replace the entries of a folder. Killed at any point, it leaves the earlier folder, or one that the next run completes."""
    stale = [UTTERANCES]  # a run without `keep_audio` has none in their place
    with suppress(FileNotFoundError, ValueError):
        stale += {*CONFIGS} & {read_counts(folder)["config"]}  # which may be another one than that of the new folder
    (folder / COUNTS).unlink(missing_ok=True)  # a folder without counts.json is unfinished
    sync_folder(folder)
    for name in stale:
        remove_path(folder / name)
    for entry in sorted(unfinished.iterdir(), key=lambda path: path.name == COUNTS):
        target = folder / entry.name
        if entry.is_dir() or (target.is_dir() and not target.is_symlink()):  # a file takes the place of one at once
            remove_path(target)
        replace_path(entry, target)
    remove_path(folder / UNFINISHED)
