"""The dataset builder: a corpus as user/agent pairs and conversations."""

import dataclasses
import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import datasets
import datasets.data_files
import soundfile

from usdm_sft.audio.containers import AudioError
from usdm_sft.audio.digests import AudioDigest, find_stamps
from usdm_sft.corpus import dailytalk, examples, features, find, read, remote
from usdm_sft.corpus import hub_corpus as hub
from usdm_sft.corpus import left_out as bad_audio
from usdm_sft.corpus.dialogs import CorpusName, FilePath, Split
from usdm_sft.corpus.problems import CorpusError, describe_left_out
from usdm_sft.corpus.unit_reader import make_reader
from usdm_sft.template import streams
from usdm_sft.utils import texts

if TYPE_CHECKING:
    from usdm_sft.utils.pool import Pool

NAME = "dailytalk_usdm"  # of the dataset, for datasets
_VERSION = datasets.Version("1.0.0")
_DESCRIPTION = (
    "{corpus} as examples for spoken-dialog language models. A row of single_turn is two neighbouring turns of a dialog, the "
    "earlier spoken by the user and the later by the agent; a row of multi_turn is a conversation. Each turn has its speaker, text, "
    "emotion and the path of its recording."
)


def code_digest() -> str:
    """Return the sha256 of the code and the libraries that decide the rows, so that a change to them invalidates cached rows."""
    package = Path(texts.__file__).parents[1]
    modules = [path for name in ("audio", "corpus") for path in sorted((package / name).glob("*.py"))]
    code = hashlib.sha256(f"{datasets.__version__.split('.')[0]} {soundfile.__libsndfile_version__}".encode())
    for path in (*modules, Path(streams.__file__), Path(texts.__file__)):
        code.update(path.read_bytes())
    return code.hexdigest()


@dataclasses.dataclass
class DailyTalkUSDMConfig(datasets.BuilderConfig):  # type: ignore[misc]  # datasets has no types
    """Configuration of the builder.

    Attributes:
        history: Number of earlier exchanges that a pair of single_turn brings along as context; fewer at the start of a dialog.
            The user and agent columns are then lists, one entry per exchange, the pair last.
        agent, merge_speaker_turns, merge, max_gap, on_bad_rows, min_seconds, max_seconds, keep_columns, needs_text: As in
            `usdm_sft.corpus.read.Rules`, where None is the default.
        on_bad_audio: "error" stops at bad audio, "skip" leaves out the pairs that use it.
        val_dialogs: Number or share of the dialogs of train that become the split validation (`usdm_sft.corpus.read.take_validation`).
        val_seed: Seed that chooses them.
        unit_rate: Units, or frames of several, per second, if the manifests have units (the column `units`), which are read then.
        num_units: Number of these units: of every stream, or a list with one for each stream.
        streams: What is made of frames of several units, "first" or "flatten".
        corpus: The kind of the corpus, as in `prepare`. By default its files tell it.
        corpus_digest: sha256 over the split lists and over path, size and times of change of the recordings, as datasets tells
            data files apart. The builder fills it in, and the cache follows it.
    """

    history: int = 0
    agent: str | None = None
    merge_speaker_turns: bool = False
    merge: str | None = None
    max_gap: float | None = None
    on_bad_rows: str | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None
    keep_columns: str | None = None
    needs_text: bool = True
    on_bad_audio: str = "error"
    val_dialogs: int | float | None = None
    val_seed: int = 0
    unit_rate: float | None = None
    num_units: int | Sequence[int] | None = None
    streams: str | None = None
    corpus: CorpusName | None = None
    corpus_digest: str | None = None


class DailyTalkUSDM(datasets.GeneratorBasedBuilder):  # type: ignore[misc]
    """Spoken dialogs as pairs: two neighbouring turns of a dialog, the earlier as the user and the later as the agent.

    A row of single_turn is one pair. A row of multi_turn is a conversation; its user and agent columns are lists, one entry per
    exchange. Rows are in order of dialog number and turn. Audio is the path of the recording, never its bytes; symlinks are
    followed. DailyTalk's metadata.json is not read, because the split lists hold everything.

    The constructor reads the lists, downloads remote recordings and opens none. The audio is checked when rows are made, or when `screen_audio`,
    `corpus` or `audio_digests` is used.

    Args:
        data_dir: DailyTalk's folder (with `data/`), its `data` folder, or its zip archive. For another corpus, its folder
            (`usdm_sft.corpus.find.RECIPES`), where relative paths of its recordings start, one of its files, or "hub:USER/NAME". A folder
            with manifests may be remote, such as "s3://bucket/calls" (`usdm_sft.corpus.remote`).
        data_files: The split lists, such as `{"train": "train.txt", "test": "test.txt"}`, or manifests. By default those in or
            beside the folder, or else DailyTalk's own lists, which are downloaded once.
        base_path: As in `datasets.DatasetBuilder`.
        digest_cache_dir: Where digests of audio files are remembered; this package's cache by default.
        on_bad_audio: "error" stops and names every bad file; "skip" leaves out its pairs (`corpus[split].pairs_left_out`).
        args: Positional arguments of `datasets.DatasetBuilder`.
        kwargs: Fields of `DailyTalkUSDMConfig`, and keyword arguments of `datasets.DatasetBuilder`.

    Attributes:
        whole_corpus: The `usdm_sft.corpus.dialogs.Split` of each split, before bad audio is left out.
        split_lists: The path of each split's list.
        list_digests: The sha256 of each split's list.
        unit_streams: The `usdm_sft.template.streams.UnitStreams` of the units that the corpus has; None if it has recordings.

    Raises:
        ValueError: The config does not exist, an option is wrong, or DailyTalk's own split lists are swapped.
        FileNotFoundError: Data or a split list is missing.
        usdm_sft.corpus.problems.CorpusError: The split lists are wrong; the message names each problem with file and line.
    """

    BUILDER_CONFIG_CLASS = DailyTalkUSDMConfig
    BUILDER_CONFIGS = [  # noqa: RUF012
        DailyTalkUSDMConfig(examples.SINGLE_TURN, _VERSION, description="one pair per row, as USDM is trained"),
        DailyTalkUSDMConfig(examples.MULTI_TURN, _VERSION, description="one conversation per row"),
    ]
    DEFAULT_CONFIG_NAME = examples.SINGLE_TURN

    def __init__(
        self,
        *args: Any,
        data_dir: FilePath | None = None,
        data_files: find.DataFiles | None = None,
        base_path: str | None = None,
        digest_cache_dir: str | Path | None = None,
        on_bad_audio: str = "error",
        **kwargs: Any,
    ) -> None:
        examples.check_config(kwargs.get("config_name") or self.DEFAULT_CONFIG_NAME, kwargs.get("history") or 0)
        self.split_lists: dict[str, Path] = {}
        kind = kwargs.get("corpus")
        if kind is not None and kind not in get_args(CorpusName):
            raise ValueError(f"corpus {kind!r} is unknown: choose one of {', '.join(get_args(CorpusName))}")
        if data_dir is not None or data_files is not None:
            resolved = isinstance(data_files, datasets.data_files.DataFilesDict)
            self.split_lists = find.find_lists(
                data_dir,
                data_files,
                corpus=kind,
                cache_dir=digest_cache_dir,
                resolved=resolved,
                with_units=kwargs.get("unit_rate") is not None,
            )
        recipes = {find.recipe_of(path, kind) for path in self.split_lists.values()}
        if data_dir is None and (not recipes or any(recipe.needs_data_dir for recipe in recipes)):
            raise ValueError("data_dir is missing: name the folder that DailyTalk was unpacked to, or its zip archive")
        if kwargs.get("agent") is not None:
            kwargs["agent"] = str(kwargs["agent"])  # speakers are texts, also those that are numbers
        self._rules = read.Rules.of(kwargs)
        reader = make_reader(kwargs.get("unit_rate"), kwargs.get("num_units"), kwargs.get("streams"))
        self._naming_errors = partial(hub.naming_dataset, self.split_lists, data_dir)
        with self._naming_errors():
            corpus = read.read_corpus(self.split_lists, self._rules, data_dir=data_dir, units=reader, corpus=kind)
            corpus = hub.place_rows(corpus, self.split_lists, data_dir)
            self.whole_corpus = remote.fetch_recordings(corpus, digest_cache_dir)
            for split in self.whole_corpus.values():
                if not split.dialogs:
                    reasons = describe_left_out(split.left_out) or "it is empty"
                    remedy = read.find_merge_remedy(split)
                    remedy = f"{remedy}, or name another split list" if remedy else "name another split list"
                    raise CorpusError([f"{self.split_lists[split.name]}: not one pair: {reasons}: {remedy}"])
        if (val_dialogs := kwargs.get("val_dialogs")) is not None:
            self.whole_corpus = read.take_validation(self.whole_corpus, val_dialogs, kwargs.get("val_seed") or 0)
        self.unit_streams = None if reader is None else reader.streams
        self.list_digests = {split: find.digest_list(path, data_dir, kind) for split, path in self.split_lists.items()}
        dailytalk.check_not_swapped(self.split_lists, self.list_digests)
        bad_audio.check_option(on_bad_audio)
        self._digest_cache_dir = digest_cache_dir
        self._screened: tuple[dict[str, Split], dict[str, AudioDigest]] | None = None
        kwargs |= {"hash": code_digest(), "on_bad_audio": on_bad_audio, "corpus_digest": self._find_corpus_digest()}
        kwargs.setdefault("dataset_name", NAME)  # by default datasets takes the name of this module
        super().__init__(
            *args, data_dir=str(find.find_root(data_dir, self.split_lists, kind)), base_path=base_path, **kwargs
        )
        self.info.features = self._info().features  # an existing cache restores plain Audio, which needs torchcodec

    def _find_corpus_digest(self) -> str:
        stamps = find_stamps(bad_audio.list_addresses(self.whole_corpus))
        return hashlib.sha256(json.dumps([self.list_digests, list(stamps.items())]).encode()).hexdigest()

    def screen_audio(self, pool: "Pool | None" = None) -> tuple[dict[str, Split], dict[str, AudioDigest]]:
        """Check all audio and leave out the pairs with bad audio, once.

        Args:
            pool: Shares out recordings that are read for the first time; by default threads of this process read them.

        Returns:
            `corpus` and `audio_digests`.

        Raises:
            FileNotFoundError: Audio files are missing, and nothing else is wrong.
            usdm_sft.audio.reading.AudioError: Audio cannot become units, or a split has no pair left.
        """
        if self._screened is None:
            with self._naming_errors():
                self._screened = bad_audio.screen_audio(
                    self.whole_corpus,
                    self.config.on_bad_audio,
                    self._digest_cache_dir,
                    pool,
                    rules=self._rules,
                    streams=self.unit_streams,
                )
        return self._screened

    @property
    def corpus(self) -> dict[str, Split]:
        """The `usdm_sft.corpus.dialogs.Split` of each split, after bad audio was left out; checks the audio first."""
        return self.screen_audio()[0]

    @property
    def audio_digests(self) -> dict[str, AudioDigest]:
        """The `usdm_sft.audio.digests.AudioDigest` of each recording that a pair uses, by address; checks the audio first."""
        return self.screen_audio()[1]

    @property
    def further_columns(self) -> tuple[str, ...]:
        """The further columns of the corpus that the rows keep."""
        return next(iter(self.whole_corpus.values())).columns

    @property
    def content_digest(self) -> str:
        """The sha256 over the lists, the content of the audio and the pairs left out for bad audio, wherever the files lie."""
        return bad_audio.corpus_digest(self.list_digests, self.audio_digests, self.corpus)

    def _info(self) -> datasets.DatasetInfo:
        published = dailytalk.are_published_lists(self.list_digests)
        corpus = "DailyTalk, 20 hours of English dialogs read by two speakers," if published else "Spoken dialogs"
        return datasets.DatasetInfo(
            description=_DESCRIPTION.format(corpus=corpus),
            features=features.example_features(
                lists=examples.config_has_lists(self.config.name, self.config.history),
                units=self.unit_streams is not None,
                columns=self.further_columns,
            ),
            **(dailytalk.INFO if published else {}),
        )

    def _load_info(self, *args: Any, **kwargs: Any) -> datasets.DatasetInfo:
        info = super()._load_info(*args, **kwargs)
        info.features = self._info().features
        return info

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        corpus = self.corpus
        if self._find_corpus_digest() != self.config.corpus_digest:  # which names the folder of the rows
            raise AudioError(
                "recordings were changed after the corpus was opened: let nothing write to them, and load it again"
            )
        # datasets divides the lists in gen_kwargs over processes and streaming workers.
        return [
            datasets.SplitGenerator(
                name=split, gen_kwargs={"split": split, "dialogs": list(range(len(content.dialogs)))}
            )
            for split, content in corpus.items()
        ]

    def _generate_examples(self, split: str, dialogs: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
        name, history = self.config.name, self.config.history
        lists = examples.config_has_lists(name, history)
        for dialog in map(self.corpus[split].dialogs.__getitem__, dialogs):
            for example in examples.make_examples(dialog, name, history):
                row: dict[str, Any] = {"id": example.id, "dialog_id": dialog.id, "turn": example.turn}
                for role, utterances in zip(features.ROLES, zip(*example.exchanges, strict=True), strict=True):
                    columns: dict[str, list[Any]] = {
                        column: [getattr(utterance, column) for utterance in utterances] for column in features.TEXTS
                    }
                    columns |= {
                        column: [(utterance.more or {}).get(column, "") for utterance in utterances]
                        for column in self.further_columns
                    }
                    columns["audio"] = [
                        {"bytes": None, "path": utterance.audio} if utterance.audio else None
                        for utterance in utterances
                    ]
                    if self.unit_streams is not None:
                        columns["units"] = [utterance.units for utterance in utterances]
                        columns["seconds"] = [
                            self.unit_streams.count_seconds(len(utterance.units)) for utterance in utterances
                        ]
                    row |= {f"{role}_{column}": values if lists else values[0] for column, values in columns.items()}
                yield example.id, row


def load_dataset(
    data_dir: FilePath,
    name: str = examples.SINGLE_TURN,
    *,
    data_files: find.DataFiles | None = None,
    **kwargs: Any,
) -> datasets.DatasetDict | datasets.Dataset | datasets.IterableDatasetDict | datasets.IterableDataset:
    """Load the pairs or conversations with `datasets.load_dataset`, and name the split lists for it.

    Without named lists, datasets lists and hashes every file in `data_dir` at each call (26 s for DailyTalk's 23,676 files).

    Args:
        data_dir: DailyTalk's folder (with `data/`), its `data` folder, or its zip archive; see `DailyTalkUSDM`.
        name: The config, "single_turn" or "multi_turn".
        data_files: Split lists other than those beside the data. datasets takes a path for a glob pattern.
        kwargs: Further arguments of `datasets.load_dataset`, such as `split`, `streaming`, `num_proc` and `cache_dir`, and fields
            of `DailyTalkUSDMConfig`, such as `history`.

    Returns:
        A `Dataset` if `split` is given, otherwise a `DatasetDict`; with `streaming`, their iterable counterparts.

    Raises:
        ValueError, OSError: As `DailyTalkUSDM`.
    """
    on_hub = hub.is_hub_corpus(data_dir)
    if on_hub or data_files is None:
        with_units = kwargs.get("unit_rate") is not None
        lists = find.find_lists(
            data_dir, corpus=kwargs.get("corpus"), cache_dir=kwargs.get("digest_cache_dir"), with_units=with_units
        )
        data_files = {split: glob.escape(str(path.resolve())) for split, path in lists.items()}
    folder = None if on_hub else data_dir
    counting = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise datasets reports the call to Hugging Face
    try:
        return datasets.load_dataset(NAME, name, data_dir=folder, data_files=data_files, **kwargs)
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counting
