"""Check of the corpus: its layout, its split lists or manifests, and a sample of its recordings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import HfApi

from usdm_sft.audio.check import check_audio
from usdm_sft.cli.doctor_findings import Finding, Needs
from usdm_sft.cli.doctor_hub import TIMEOUT
from usdm_sft.corpus.dialogs import Split
from usdm_sft.corpus.find import check_data_dir, find_lists, find_manifests, find_split_lists
from usdm_sft.corpus.hub_corpus import PREFIX, is_hub_corpus
from usdm_sft.corpus.problems import CorpusError
from usdm_sft.corpus.published_lists import (
    SPLIT_LISTS,
    SPLIT_LISTS_URL,
    cached_split_lists,
    check_not_swapped,
    describe_corpus,
)
from usdm_sft.corpus.read import Rules, read_corpus
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.utils.download import remote_size
from usdm_sft.utils.hashes import sha256_file
from usdm_sft.utils.texts import count_noun, format_bytes

MAX_PROBLEMS = 5  # problems that are shown
NUM_SAMPLES = 32  # recordings that are opened


def check_corpus(config: PrepareConfig, needs: Needs) -> Iterator[Finding]:
    """Find and read the lists of the corpus, and open some of its recordings."""
    if is_hub_corpus(config.data_dir):
        yield _check_hub_corpus(str(config.data_dir), needs)
        return
    lists = find_lists(config.data_dir, config.data_files) if config.data_files else _find_lists(config)
    if lists is None:
        size = sum(remote_size(f"{SPLIT_LISTS_URL}/{name}", timeout=TIMEOUT) for name, _ in SPLIT_LISTS.values())
        text = f"{config.data_dir} has no split lists: prepare downloads DailyTalk's own ({format_bytes(size)})"
        yield Finding("ok", "corpus", text)
        return
    agent = None if config.agent is None else str(config.agent)
    try:
        splits = read_corpus(lists, Rules(agent, config.merge_speaker_turns), data_dir=config.data_dir)
    except CorpusError as error:
        yield from _list_problems(error.problems)
        return
    digests = {split: sha256_file(path) for split, path in lists.items()}
    check_not_swapped(lists, digests)
    yield from _describe_splits(splits, lists, describe_corpus(lists, digests))
    yield from _check_recordings(splits, needs, skip=config.on_bad_audio == "skip")


def _find_lists(config: PrepareConfig) -> dict[str, Path] | None:
    """Find the lists as `find_lists` does, but without a download."""
    folder = check_data_dir(config.data_dir)
    return find_manifests(folder) or find_split_lists(folder) or cached_split_lists(config.cache_dir)


def _check_hub_corpus(name: str, needs: Needs) -> Finding:
    if not needs.online:
        return Finding("warning", "corpus", f"{name} cannot be looked at without the Hub: check the network")
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    HfApi().dataset_info(repository, revision=revision or None, timeout=TIMEOUT)
    return Finding("ok", "corpus", f"{name} is on the Hub; prepare downloads and checks it")


def _list_problems(problems: list[str]) -> Iterator[Finding]:
    yield from (Finding("error", "corpus", problem) for problem in problems[:MAX_PROBLEMS])
    if (more := len(problems) - MAX_PROBLEMS) > 0:
        text = f"{count_noun(more, 'problem')} more: correct these first, prepare then lists 20 at once"
        yield Finding("error", "corpus", text)


def _describe_splits(splits: Mapping[str, Split], lists: Mapping[str, Path], kind: str) -> Iterator[Finding]:
    for name, split in splits.items():
        text = (
            f"{lists[name]} ({kind}): {count_noun(len(split.dialogs), 'dialog')}, {count_noun(split.num_pairs, 'pair')}"
        )
        if split.left_out:
            text += f"; {count_noun(len(split.left_out), 'dialog')} left out, as counts.json will say"
        if split.dialogs:
            yield Finding("ok", "corpus", text)
        else:
            yield Finding("error", "corpus", f"{text}: name another list for {name}")


def _check_recordings(splits: Mapping[str, Split], needs: Needs, *, skip: bool) -> Iterator[Finding]:
    """Open recordings that are spread over the corpus; their mean length gives the size of the run."""
    addresses = [each.audio for split in splits.values() for dialog in split.dialogs for each in dialog.utterances]
    sample = addresses[:: max(1, len(addresses) // NUM_SAMPLES)][:NUM_SAMPLES]
    checks = [check_audio(address) for address in sample]
    bad = [f"{path} {check.problem}" for path, check in zip(sample, checks, strict=True) if check.problem is not None]
    remedy = "replace the file, or leave out its pairs with --on_bad_audio skip"
    for problem in bad[:MAX_PROBLEMS]:
        yield Finding(
            "warning" if skip else "error", "recordings", f"{problem}: {remedy}; prepare lists every such file"
        )
    good = [check for check in checks if check.problem is None]
    if good:
        needs.audio_seconds = sum(check.frames / check.rate for check in good) / len(good) * len(addresses)
        needs.audio_bytes = sum(2 * check.frames for check in good) / len(good) * len(addresses)
    text = f"{len(sample) - len(bad)} of {len(sample)} that were opened are good; the corpus has {len(addresses):,}"
    if good:
        text += f", about {needs.audio_seconds / 3600:.2g} hours"
    yield Finding("ok", "recordings", text)
