"""Verify a dataset folder: files, schema, counts, labels, and every row against the template. Reports all problems at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import yaml
from huggingface_hub.repocard import metadata_load
from tokenizers import Tokenizer

from usdm_sft.corpus.examples import CONFIGS
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.corpus.problems import MAX_PROBLEMS_SHOWN
from usdm_sft.folder.card import CARD_ERRORS, data_configs, describe_edits, find_edits, read_info
from usdm_sft.folder.compare import compare_with_text
from usdm_sft.folder.layout import (
    COUNTS,
    PICTURES,
    PREPARE_AGAIN,
    data_files,
    read_counts,
    read_framing,
    read_template,
)
from usdm_sft.folder.own_parts import CARD, OWN_PARTS, has_digest
from usdm_sft.folder.statistics import TOO_LONG, count_dropped
from usdm_sft.folder.verify_rows import LIMIT, Check, CheckedRows, check_rows, check_turns
from usdm_sft.folder.verify_utterances import check_utterances
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.streams import read_streams
from usdm_sft.template.tokenizer import describe_tokenizer, load_tokenizer, read_base_model
from usdm_sft.utils.files import sha256_file
from usdm_sft.utils.processes import num_cores
from usdm_sft.utils.texts import first_line

COUNTED = ("rows", "dialogs", "tokens", "labelled_tokens", "units")
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
    folder = Path(dataset_dir).expanduser()
    counts = read_counts(folder)
    _raise_any(_check_files(folder, counts))  # raises before a damaged file is read
    tokenizer = load_tokenizer(folder / "tokenizer")
    encoder = TemplateEncoder(
        tokenizer,
        read_template(folder / COUNTS, counts),
        last_exchange_only=counts["settings"]["history"] > 0,
        unit_repetition=counts["settings"].get("unit_repetition", "keep"),
    )
    if encoder.tokenizer_digest != counts["digests"].get("tokenizer"):  # its rows may decode to any amount of text
        raise VerificationError([f"{folder / 'tokenizer'} is not the tokenizer that {COUNTS} names"], more=False)
    schema = _read_card(folder, counts).features.arrow_schema.remove_metadata()
    files, settings = data_files(folder, counts), counts["settings"]
    framing, streams = read_framing(counts), read_streams(counts)
    check = Check(encoder, settings["max_length"], settings["history"], framing, streams)
    checked = check_rows(files, schema, check, num_proc=num_proc)
    _raise_any(checked.problems)
    _raise_any(
        f"the files of split {split} have no rows" for split, found in checked.statistics.items() if not found.numbers
    )
    _raise_any(check_turns(checked))
    described = describe_tokenizer("", encoder.tokens, encoder.layout.chat, read_base_model(tokenizer))
    _raise_any(chain(_check_counts(folder, counts, checked), _check_totals(folder, counts, checked, described)))
    if UTTERANCES in counts:
        _raise_any(check_utterances(folder, counts, checked, num_proc=num_proc))
    card_problems = _check_card(folder, counts, checked, tokenizer.backend_tokenizer)
    _raise_any(chain(_check_tokenizer_config(folder, encoder), card_problems))
    if against is not None:
        _raise_any(compare_with_text(files, Path(against).expanduser(), folder / "tokenizer", num_proc=num_proc))
    return {split: values.numbers["tokens"].total for split, values in checked.statistics.items()}


def _raise_any(problems: Iterable[str]) -> None:
    found = list(islice(problems, LIMIT))
    if found:
        raise VerificationError(found[:MAX_PROBLEMS_SHOWN], more=len(found) > MAX_PROBLEMS_SHOWN)


def _check_files(folder: Path, counts: Mapping[str, Any]) -> Iterator[str]:
    with ThreadPoolExecutor(num_cores()) as threads:  # hashing lets other threads run
        yield from filter(
            None, threads.map(partial(_check_file, folder, counts), counts["files"], counts["files"].values())
        )
    for part in (*CONFIGS, "tokenizer", PICTURES, UTTERANCES):
        for path in sorted((folder / part).rglob("*")):
            if path.is_file() and path.relative_to(folder).as_posix() not in counts["files"]:
                yield f"{path} does not belong to the folder: remove it"
    for split in counts["splits"]:
        if not any(name.startswith(f"{counts['config']}/{split}-") for name in counts["files"]):
            yield f"{folder / COUNTS} names no file of split {split}"


def _check_file(folder: Path, counts: Mapping[str, Any], name: str, digest: Any) -> str | None:
    if not _DIGEST.fullmatch(str(digest)):
        return f"{folder / COUNTS}: {name!r} has {digest!r} instead of a sha256"
    if not (folder / name).is_file():
        return f"{folder / name} is missing: put it back, or {PREPARE_AGAIN}"
    if has_digest(folder / name, digest, counts.get("corpus", "")):
        return None
    if name == CARD:
        return (
            f"{folder / name} was edited in {describe_edits(folder, counts)}: undo it, or {PREPARE_AGAIN}; {OWN_PARTS}"
        )
    return f"{folder / name} was changed: its sha256 is {sha256_file(folder / name)}, not {digest}: copy it again, or {PREPARE_AGAIN}"


def _check_counts(folder: Path, counts: Mapping[str, Any], checked: CheckedRows) -> Iterator[str]:
    """Compare counts.json and the card with the rows."""
    info = _read_card(folder, counts)
    for split, split_statistics in checked.statistics.items():
        summary = split_statistics.summary()
        for name in COUNTED:
            if counts["splits"][split].get(name) != summary[name]:
                yield f"{folder / COUNTS}: {split} has {summary[name]} {name}, not {counts['splits'][split].get(name)}"
        if counts["statistics"].get(split) != summary:
            yield f"{folder / COUNTS}: the statistics of {split} differ from those of its rows"
        if split not in info.splits or info.splits[split].num_examples != summary["rows"]:
            yield f"{folder / 'README.md'}: its YAML does not say that {split} has {summary['rows']} rows"
        if (largest := split_statistics.numbers["units"].values.max(initial=0)) >= counts["num_units"]:
            yield f"{folder / COUNTS}: {split} has unit {largest}, but num_units is {counts['num_units']}"


def _check_totals(
    folder: Path, counts: Mapping[str, Any], checked: CheckedRows, tokenizer: Mapping[str, Any]
) -> Iterator[str]:
    """Check the numbers of counts.json that follow from turns, from what was left out, and from the tokenizer."""
    path = folder / COUNTS
    settings, framing = counts["settings"], read_framing(counts)
    found = counts.get("tokenizer")
    if not isinstance(found, dict) or found | {"name": None} != json.loads(json.dumps(tokenizer)):
        yield f"{path}: tokenizer is not that of the folder: {PREPARE_AGAIN}"
    turns = checked.turns.group_by(["split", "dialog", "turn"]).aggregate([("seconds", "min")])
    for number, split in enumerate(checked.statistics):
        numbers = counts["splits"][split]
        left_out = numbers.get("pairs_left_out")
        names = ("utterances", "hours", "pairs", "pairs_with_bad_audio")
        if not isinstance(left_out, dict) or not all(isinstance(numbers.get(name), int | float) for name in names):
            yield f"{path}: the counts of {split} are not those of a dataset folder: {PREPARE_AGAIN}"
            continue
        exchanges = (
            pc.sum(pc.and_(pc.equal(checked.turns["split"], number), pc.equal(checked.turns["side"], 0))).as_py() or 0
        )
        pairs = (numbers["rows"] if settings["history"] else exchanges) + len(left_out)
        if numbers["pairs"] != pairs:
            yield f"{path}: {split} has {pairs} pairs, those in pairs_left_out included, not {numbers['pairs']}"
        too_long = sum(str(reason).endswith(f"{TOO_LONG} {settings['max_length']}") for reason in left_out.values())
        bad_rows = numbers.get("pairs_with_bad_rows", 0)
        if numbers["pairs_with_bad_audio"] != (bad := len(left_out) - too_long - bad_rows - count_dropped(numbers)):
            yield (
                f"{path}: pairs_left_out of {split} names {bad} pairs with bad audio, "
                f"not {numbers['pairs_with_bad_audio']}"
            )
        seconds = turns.filter(pc.equal(turns["split"], number))["seconds_min"].to_numpy().astype(np.float64)
        # An utterance of a kept dialog may be in no row: its pairs were left out, or its speaker is not the agent.
        is_complete = not left_out and settings.get("agent") is None
        hours = float(seconds.sum()) / 3600
        rounding = 1e-6 + 1e-7 * hours  # of the total, and of lengths that are float32
        # The total is of the recordings. As the model takes them, each is longer by up to one sample, to which its length is rounded up.
        longer = 0 if framing is None else len(seconds) / framing.sample_rate / 3600
        least, most = hours - longer - rounding, hours + rounding
        if numbers["hours"] < least or (is_complete and numbers["hours"] > most):
            yield f"{path}: the rows of {split} have {hours:.6f} hours, not {numbers['hours']}"
        if numbers["utterances"] != len(seconds) if is_complete else numbers["utterances"] < len(seconds):
            yield f"{path}: the rows of {split} have {len(seconds)} utterances, not {numbers['utterances']}"


def _check_tokenizer_config(folder: Path, encoder: TemplateEncoder) -> Iterator[str]:
    """Check what decides ids in the tokenizer's configuration; the rest depends on the version of transformers that wrote it."""
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    expected: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": None}
    if encoder.template.tokenization == "reference":
        expected |= {"bos_token": "<s>", "eos_token": "</s>"}
    for name, value in expected.items():
        found = config.get(name)
        if isinstance(found, dict) and name.endswith("_token"):  # transformers 4 writes the token with its properties
            found = found.get("content")
        if found != value:
            yield f"{path}: {name} is {found!r}, not {value!r}: {PREPARE_AGAIN}"


def _check_card(folder: Path, counts: Mapping[str, Any], checked: CheckedRows, tokenizer: Tokenizer) -> Iterator[str]:
    """Compare the card with one rendered again from counts.json and the files."""
    try:
        where = find_edits(folder, counts, tokenizer, checked.num_bytes)
    except CARD_ERRORS as error:
        yield f"{folder / COUNTS} does not have all that the card says ({first_line(error)}): {PREPARE_AGAIN}"
        return
    if where:
        if "configs" in where:  # `_read_card` has compared the rest of them
            where += ", which does not hold the digest of its data files, so that load_dataset may give cached rows of other files"
        yield f"{folder / CARD} is not the card of this folder, it differs in {where}: restore it, or {PREPARE_AGAIN}"


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
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = first_line(error)
        raise ValueError(f"{path} does not have the YAML of this folder ({reason}): {PREPARE_AGAIN}") from error


def _without_descriptions(configs: Any) -> list[dict[str, Any]]:
    """Return the configs of a card without their digests. A card that is not a list of configs raises the errors of `_read_card`."""
    return [{name: value for name, value in config.items() if name != "description"} for config in configs]
