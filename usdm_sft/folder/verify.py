"""Verify a dataset folder: files, schema, counts, labels, and every row against the template. Reports all problems at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.corpus.problems import MAX_PROBLEMS_SHOWN
from usdm_sft.folder.card import data_configs, read_info
from usdm_sft.folder.compare import compare_with_text
from usdm_sft.folder.layout import (
    COUNTS,
    PICTURES,
    PREPARE_AGAIN,
    data_files,
    read_counts,
    read_normalization,
    read_template,
)
from usdm_sft.folder.statistics import SplitStatistics
from usdm_sft.folder.verify_rows import check_rows
from usdm_sft.folder.verify_utterances import check_utterances
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.tokenizer import load_tokenizer
from usdm_sft.utils.files import sha256_file
from usdm_sft.utils.processes import num_cores
from usdm_sft.utils.texts import first_line

COUNTED = ("rows", "tokens", "labelled_tokens", "units")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class VerificationError(ValueError):
    """A dataset folder did not pass verification. The message has one line per problem, with its place."""

    def __init__(self, problems: Sequence[str], more: bool):
        super().__init__("\n".join([*problems, "... and more problems"] if more else problems))
        self.problems = list(problems)


def verify(
    dataset_dir: str | Path, against: str | Path | None = None, *, num_proc: int | None = None
) -> dict[str, int]:
    """Check a dataset folder: the digest of each file, the schema, the counts, each label, and each row against its
    columns. Where the folder keeps the audio, also each recording against its units, and the rows against the utterances.

    Args:
        dataset_dir: A folder that `prepare` made, or a copy of it.
        against: A folder with the reference's train.txt and test.txt; their lines must equal the rows, in any order.
        num_proc: Largest number of processes. By default one per core that this process may use. A small folder needs
            none. What is found does not depend on it.

    Returns:
        The number of rows of each split.

    Raises:
        FileNotFoundError: `dataset_dir` is not a finished dataset folder, or a file of `against` is missing.
        VerificationError: A check failed; the message names up to 20 places.
        ValueError: counts.json, a Parquet file or the card cannot be read.
    """
    folder = Path(dataset_dir)
    counts = read_counts(folder)
    _raise_any(_check_files(folder, counts))  # raises before a damaged file is read
    encoder = _make_encoder(folder, counts)
    if encoder.tokenizer_digest != counts["digests"].get("tokenizer"):  # its rows may decode to any amount of text
        raise VerificationError([f"{folder / 'tokenizer'} is not the tokenizer that {COUNTS} names"], more=False)
    schema = _read_card(folder, counts).features.arrow_schema.remove_metadata()
    files = data_files(folder, counts)
    statistics: dict[str, SplitStatistics] = {}
    normalization, settings = read_normalization(counts), counts["settings"]
    _raise_any(check_rows(files, schema, encoder, settings, statistics, normalization=normalization, num_proc=num_proc))
    _raise_any(_check_counts(folder, counts, statistics))
    if UTTERANCES in counts:
        _raise_any(check_utterances(folder, counts, num_proc=num_proc))
    _raise_any(_check_descriptions(folder, counts))  # last: damaged rows are named first
    if against is not None:
        _raise_any(compare_with_text(files, Path(against), folder / "tokenizer", num_proc=num_proc))
    return {split: values.summary()["rows"] for split, values in statistics.items()}


def _raise_any(problems: Iterator[str]) -> None:
    found = [problem for _, problem in zip(range(MAX_PROBLEMS_SHOWN), problems, strict=False)]
    if found:
        raise VerificationError(found, more=next(problems, None) is not None)


def _check_files(folder: Path, counts: Mapping[str, Any]) -> Iterator[str]:
    with ThreadPoolExecutor(num_cores()) as threads:  # hashing lets other threads run
        yield from filter(None, threads.map(partial(_check_file, folder), counts["files"], counts["files"].values()))
    for part in (counts["config"], "tokenizer", PICTURES, UTTERANCES):
        for path in sorted((folder / part).rglob("*")):
            if path.is_file() and path.relative_to(folder).as_posix() not in counts["files"]:
                yield f"{path} does not belong to the folder: remove it"
    for split in counts["splits"]:
        if not any(name.startswith(f"{counts['config']}/{split}-") for name in counts["files"]):
            yield f"{folder / COUNTS} names no file of split {split}"


def _check_file(folder: Path, name: str, digest: Any) -> str | None:
    if not _DIGEST.fullmatch(str(digest)):
        return f"{folder / COUNTS}: {name!r} has {digest!r} instead of a sha256"
    if not (folder / name).is_file():
        return f"{folder / name} is missing"
    if (found := sha256_file(folder / name)) != digest:
        return f"{folder / name} was changed: its sha256 is {found}, not {digest}"
    return None


def _make_encoder(folder: Path, counts: Mapping[str, Any]) -> TemplateEncoder:
    """The encoder with the tokenizer of the folder and the settings of counts.json."""
    template = read_template(folder / COUNTS, counts)
    tokenizer = load_tokenizer(folder / "tokenizer")
    return TemplateEncoder(
        tokenizer,
        template,
        last_exchange_only=counts["settings"]["history"] > 0,
        unit_repetition=counts["settings"].get("unit_repetition", "keep"),
    )


def _check_counts(folder: Path, counts: Mapping[str, Any], statistics: Mapping[str, SplitStatistics]) -> Iterator[str]:
    """Compare counts.json and the card with the rows."""
    info = _read_card(folder, counts)
    for split, split_statistics in statistics.items():
        summary = split_statistics.summary()
        for name in COUNTED:
            if counts["splits"][split].get(name) != summary[name]:
                yield f"{folder / COUNTS}: {split} has {summary[name]} {name}, not {counts['splits'][split].get(name)}"
        if counts["statistics"].get(split) != summary:
            yield f"{folder / COUNTS}: the statistics of {split} differ from those of its rows"
        if split not in info.splits or info.splits[split].num_examples != summary["rows"]:
            yield f"{folder / 'README.md'}: its YAML does not say that {split} has {summary['rows']} rows"


def _check_descriptions(folder: Path, counts: Mapping[str, Any]) -> Iterator[str]:
    """Compare the digest of the data files in the YAML of each config with that of counts.json."""
    path = folder / "README.md"
    for found, expected in zip((metadata_load(path) or {})["configs"], data_configs(counts), strict=True):
        if found != expected:
            yield (
                f"{path}: the YAML of {expected['config_name']} does not hold the digest of its data files, so that load_dataset may "
                f"give cached rows of other files: {PREPARE_AGAIN}"
            )


def _read_card(folder: Path, counts: Mapping[str, Any]) -> datasets.DatasetInfo:
    """The features and splits that `load_dataset` reads from the card.

    Raises:
        ValueError: The YAML is malformed, names other data files than counts.json, or has no features or splits.
    """
    path = folder / "README.md"
    try:
        configs = (metadata_load(path) or {}).get("configs")
        if _without_descriptions(configs) != _without_descriptions(data_configs(counts)):
            raise ValueError("its configs are not the data files of counts.json")
        return read_info(folder, counts["config"])
    except (YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = first_line(error)
        raise ValueError(f"{path} does not have the YAML of this folder ({reason}): {PREPARE_AGAIN}") from error


def _without_descriptions(configs: Any) -> list[dict[str, Any]]:
    """Return the configs of a card without their digests. A card that is not a list of configs raises the errors of `_read_card`."""
    return [{name: value for name, value in config.items() if name != "description"} for config in configs]
