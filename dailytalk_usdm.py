"""DailyTalk as user/agent pairs and conversations: the loading script and builder, and the public names of the package.

After `import dailytalk_usdm`, `load_dataset("dailytalk_usdm", "single_turn", data_dir=..., data_files=...)` works on every
version of datasets; datasets 3 also takes the path of this file, and `DailyTalkUSDM` can be used directly.
"""

import dataclasses
import hashlib
import importlib
import json
import os
from pathlib import Path

import datasets
import datasets.data_files
import datasets.packaged_modules

from usdm_sft.audio import addresses
from usdm_sft.corpus import bad_audio, dialogs, examples, manifest, problems, published_lists, split_list
from usdm_sft.corpus import features as usdm_features
from usdm_sft.corpus import hub as hub_corpus
from usdm_sft.corpus import read as corpus
from usdm_sft.utils import cache, texts

_PUBLIC = {
    "PaddingCollator": "usdm_sft.training.collate",
    "PaddingFreeCollator": "usdm_sft.training.collate",
    "STEPS": "usdm_sft.training.generation",
    "next_prompt": "usdm_sft.training.generation",
    "StepLogitsProcessor": "usdm_sft.training.generation",
    "Template": "usdm_sft.template.config",
    "TemplateEncoder": "usdm_sft.template.encoder",
    "UnitTokenizer": "usdm_sft.units.tokenizer",
    "build_tokenizer": "usdm_sft.template.tokenizer",
    "load_tokenizer": "usdm_sft.template.tokenizer",
    "prepare": "usdm_sft.prepare",
    "push": "usdm_sft.dataset_folder.push",
    "verify": "usdm_sft.dataset_folder.verify",
}

_GUESSED = {"train": ["train_phone.txt"], "validation": ["val_phone.txt"]}

# Only of the published split lists, which are recognized by their sha256.
_DAILYTALK = {
    "homepage": "https://github.com/keonlee9420/DailyTalk",
    "license": "CC BY-SA 4.0, offered for academic use; the texts come from DailyDialog, CC BY-NC-SA 4.0 (not confirmed)",
    "citation": "Keon Lee, Kyumin Park, Daeyoung Kim: DailyTalk: Spoken Dialogue Dataset for Conversational Text-to-Speech. "
    "2022, arXiv:2207.01063",
}


def _code_digest() -> str:
    """Of what decides the rows: a change of it makes cached rows anew."""
    code = hashlib.sha256(datasets.__version__.split(".")[0].encode())
    for module in (
        addresses,
        bad_audio,
        corpus,
        dialogs,
        examples,
        manifest,
        problems,
        split_list,
        texts,
        usdm_features,
    ):
        code.update(Path(module.__file__).read_bytes())
    code.update(Path(__file__).read_bytes())
    return code.hexdigest()


@dataclasses.dataclass
class DailyTalkUSDMConfig(datasets.BuilderConfig):
    """Configuration of the builder.

    Attributes:
        history: Earlier exchanges that a pair of single_turn brings along as context, where there are so many; the user and
            agent columns are then lists, one entry an exchange, the pair last.
        agent: The speaker who is the agent in every pair; by default both sides are in turn, as in the reference.
        merge_speaker_turns: Make one turn of neighbouring ones of a speaker; by default such dialogs are left out whole, as
            in the reference.
        on_bad_audio: "error" stops where audio is bad, "skip" leaves out the pairs concerned.
        corpus_digest: sha256 over the split lists, the audio and what was left out for bad audio; the builder fills it in, and
            the cache follows it.
    """

    history: int = 0
    agent: str | None = None
    merge_speaker_turns: bool = False
    on_bad_audio: str = "error"
    corpus_digest: str | None = None


class DailyTalkUSDM(datasets.GeneratorBasedBuilder):
    """Every two neighbouring turns of a dialog, the earlier as the user and the later as the agent: an exchange.

    A row of single_turn is one exchange; a row of multi_turn is a conversation, with lists of its exchanges in the user and
    agent columns. Rows are in order of dialog number and turn. Audio is the path of the recording, never its bytes; symlinks
    are followed. DailyTalk's metadata.json is not read: the split lists say everything.

    Args:
        data_dir: DailyTalk's folder (with `data/`), its `data` folder, or its zip archive. Of another corpus, the folder that holds
            its manifests (`usdm_sft.corpus.manifest`) and that its recordings are named from, or "hub:USER/NAME".
        data_files: The split lists, such as `{"train": "train.txt", "test": "test.txt"}`, or manifests; where none are named,
            those in or beside the folder, or else DailyTalk's own lists, fetched once.
        on_bad_audio: Where audio cannot become units, "error" stops and names every file; "skip" leaves out the pairs concerned,
            which `corpus[split].pairs_left_out` lists.
        digest_cache_dir: Where digests of audio files are remembered; this package's cache by default.
        kwargs: Fields of `DailyTalkUSDMConfig`, and whatever `datasets.DatasetBuilder` takes.

    Raises:
        ValueError: There is no such config, an option is wrong, or DailyTalk's own split lists are swapped.
        FileNotFoundError: Data, a split list or an audio file is missing.
        usdm_sft.corpus.problems.CorpusError: The split lists are wrong; every problem is named with file and line.
        usdm_sft.audio.reading.AudioError: An audio file cannot become units, or bad audio leaves no pair of a split.
    """

    BUILDER_CONFIG_CLASS = DailyTalkUSDMConfig
    BUILDER_CONFIGS = [  # noqa: RUF012
        DailyTalkUSDMConfig(
            name=examples.SINGLE_TURN,
            version=datasets.Version("1.0.0"),
            description="one exchange an example, as USDM is trained",
        ),
        DailyTalkUSDMConfig(
            name=examples.MULTI_TURN,
            version=datasets.Version("1.0.0"),
            description="a conversation an example, from the even start and from the odd one",
        ),
    ]
    DEFAULT_CONFIG_NAME = examples.SINGLE_TURN

    def __init__(
        self,
        *args,
        data_dir=None,
        data_files=None,
        base_path=None,
        digest_cache_dir=None,
        on_bad_audio="error",
        **kwargs,
    ):
        examples.check_config(kwargs.get("config_name") or self.DEFAULT_CONFIG_NAME, kwargs.get("history") or 0)
        if hub_corpus.is_hub_corpus(data_dir):
            data_dir, data_files = None, hub_corpus.fetch_corpus(data_dir, digest_cache_dir)
        if data_dir is not None or data_files is not None:
            self.split_lists = _find_split_lists(data_dir, data_files, digest_cache_dir)
            self.is_dailytalk = not all(map(manifest.is_manifest, self.split_lists.values()))
        if data_dir is None and (data_files is None or self.is_dailytalk):
            raise ValueError(
                "data_dir is missing: name the folder that DailyTalk was unpacked into, or its zip archive"
            )
        rules = corpus.Rules(kwargs.get("agent"), kwargs.get("merge_speaker_turns") or False)
        self.corpus = corpus.read_corpus(self.split_lists, rules, data_dir=data_dir)
        for split in self.corpus.values():
            if not split.dialogs:
                reasons = "; ".join(f"{dialog}: {reason}" for dialog, reason in split.left_out.items()) or "it is empty"
                raise corpus.CorpusError(
                    [f"{self.split_lists[split.name]}: not one pair: {reasons}: name another split list"]
                )
        self.list_digests = {split: cache.sha256_file(path) for split, path in self.split_lists.items()}
        published_lists.check_not_swapped(self.split_lists, self.list_digests)
        self.corpus, self.audio_digests = bad_audio.screen_audio(self.corpus, on_bad_audio, digest_cache_dir)
        audio = [found.sha256 for found in self.audio_digests.values()]
        left_out = [dict(split.pairs_left_out) for split in self.corpus.values() if split.pairs_left_out]
        parts = [self.list_digests, audio, *left_out]
        corpus_digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        kwargs |= {"hash": _code_digest(), "on_bad_audio": on_bad_audio, "corpus_digest": corpus_digest}
        folder = next(iter(self.split_lists.values())).parent if data_dir is None else Path(data_dir).expanduser()
        if self.is_dailytalk and folder.is_dir():
            folder = split_list.find_data_folder(folder)  # one cache, however it was named
        super().__init__(*args, data_dir=str(folder.resolve()), base_path=base_path, **kwargs)
        self.info.features = self._info().features  # an existing cache has put plain Audio in their place

    def _info(self):
        return datasets.DatasetInfo(
            description=__doc__,
            features=usdm_features.example_features(lists=examples.has_lists(self.config.name, self.config.history)),
            **(_DAILYTALK if published_lists.are_published_lists(self.list_digests) else {}),
        )

    def _load_info(self, *args, **kwargs):
        info = super()._load_info(*args, **kwargs)
        info.features = self._info().features
        return info

    def _split_generators(self, dl_manager):
        # A list is what datasets splits over processes and streaming workers: a dialog is a shard.
        return [
            datasets.SplitGenerator(name=split.name, gen_kwargs={"dialogs": list(split.dialogs)})
            for split in self.corpus.values()
        ]

    def _generate_examples(self, dialogs):
        name, history = self.config.name, self.config.history
        lists = examples.has_lists(name, history)
        for dialog in dialogs:
            for example in examples.make_examples(dialog, name, history):
                row = {"id": example.id, "dialog_id": dialog.id, "turn": example.turn}
                for role, utterances in zip(("user", "agent"), zip(*example.exchanges, strict=True), strict=True):
                    columns = {
                        "speaker": [utterance.speaker for utterance in utterances],
                        "text": [utterance.text for utterance in utterances],
                        "emotion": [utterance.emotion for utterance in utterances],
                        "audio": [{"bytes": None, "path": utterance.audio} for utterance in utterances],
                    }
                    row |= {f"{role}_{column}": its if lists else its[0] for column, its in columns.items()}
                yield example.id, row


def load_dataset(data_dir, name="single_turn", *, data_files=None, **kwargs):
    """`datasets.load_dataset` of this builder, with the split lists named for you.

    Unnamed, datasets lists and hashes every file under `data_dir` at each call (26 s for the 23,676 of DailyTalk).

    Args:
        data_dir: DailyTalk's folder (with `data/`), its `data` folder, or its zip archive; see `DailyTalkUSDM`.
        name: The config, "single_turn" or "multi_turn".
        data_files: Split lists other than those beside the data.
        kwargs: `split`, `streaming`, `num_proc`, `cache_dir`, ... of `datasets.load_dataset`; `history` of the config.

    Returns:
        What `datasets.load_dataset` returns.
    """
    if hub_corpus.is_hub_corpus(data_dir):
        found = hub_corpus.fetch_corpus(data_dir, kwargs.get("digest_cache_dir"))
        data_dir, data_files = None, {split: str(path) for split, path in found.items()}
    elif data_files is None:
        found = _find_split_lists(data_dir, None, kwargs.get("digest_cache_dir"))
        data_files = {split: str(path.resolve()) for split, path in found.items()}
    counting = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else datasets tells Hugging Face of the call, over the network
    try:
        return datasets.load_dataset("dailytalk_usdm", name, data_dir=data_dir, data_files=data_files, **kwargs)
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counting


def _find_split_lists(data_dir, data_files, cache_dir) -> dict[str, Path]:
    """-> the path of each split's list: named (relative to data_dir), or beside the data, or else DailyTalk's own."""
    data_dir = split_list.check_data_dir(data_dir or "")
    if data_files is not None:
        if isinstance(data_files, str | os.PathLike | list | tuple):
            data_files = {"train": data_files}
        lists = {}
        for split, files in data_files.items():
            files = [files] if isinstance(files, str | os.PathLike) else files
            lists[str(split)] = [Path(data_dir, Path(file).expanduser()) for file in files]
        # Where the user names none, datasets puts there what it finds under data_dir: audio, or lists under other names.
        guessed = isinstance(data_files, datasets.data_files.DataFilesDict) and (
            any(file.suffix == ".wav" for files in lists.values() for file in files)
            or {split: [file.name for file in files] for split, files in lists.items()} == _GUESSED
        )
        if not guessed:
            for split, files in lists.items():
                if len(files) != 1:
                    raise ValueError(f"data_files names {len(files)} split lists for {split}: name one")
            return {split: files[0] for split, files in lists.items()}
    if found := manifest.find_manifests(data_dir):
        return found
    return split_list.find_split_lists(data_dir) or published_lists.fetch_split_lists(cache_dir)


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Lets load_dataset find the builder by name. A private dict of datasets, and the only thing of it that is touched; should
# it ever go, the builder class and `datasets` 3's way by path still work. A copy of this file under another name (datasets 3
# makes one) stays out of it.
if __name__ == "dailytalk_usdm" and hasattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES"):
    datasets.packaged_modules._PACKAGED_DATASETS_MODULES["dailytalk_usdm"] = (__name__, _code_digest())
