"""fit_unit_model(): from a speech encoder and a corpus to a unit model folder with centroids of its own.

corpus -> sample of recordings -> features -> k-means -> unit model folder
                                  cache                  convert
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from usdm_sft import __version__
from usdm_sft.audio.digests import AudioDigest
from usdm_sft.audio.frames import SAMPLE_RATE, Framing
from usdm_sft.corpus.builder import DailyTalkUSDM
from usdm_sft.corpus.find import describe_corpus
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.open_run import open_corpus
from usdm_sft.template.config import MAX_UNITS
from usdm_sft.units import kmeans
from usdm_sft.units.convert import write_unit_model
from usdm_sft.units.features import FeatureExtractor, Recording, compute_features, load_features, open_encoder
from usdm_sft.units.folder import read_description, unit_model_digest
from usdm_sft.units.settings import DESCRIPTION, XLSR_LAYER, PrecisionName
from usdm_sft.utils.cache_keys import cache_key, cache_root
from usdm_sft.utils.files import read_json, remove_path, write_then_replace
from usdm_sft.utils.locks import file_lock
from usdm_sft.utils.texts import count_noun

logger = logging.getLogger(__name__)

NUM_FRAMES = 1_000_000  # 5.6 hours; 5.1 GB of features if they are 1,280 wide
HELD_OUT = 20  # the held-out sample has up to 1/20 of the frames
_TRAIN, _TEST = "train", "test"
_VERSION = "1"  # of the code that makes centroids from features; part of the key
_VERSIONED = ("numpy", "scikit-learn", "torch", "transformers")


class Sample(NamedTuple):
    """Recordings in the order of their features, and how many of their frames are used; those of the last one may be cut."""

    recordings: list[Recording]
    num_frames: int


def fit_unit_model(
    checkpoint: str | Path,
    data_dir: str | Path,
    unit_model_dir: str | Path,
    *,
    num_units: int = 10_000,
    layer: int = XLSR_LAYER,
    num_frames: int = NUM_FRAMES,
    seed: int = 0,
    num_passes: int = 10,
    final_norm: bool = False,
    model_config: str | Path | None = None,
    device: str | None = None,
    precision: PrecisionName = "fp32",
    cache_dir: str | Path | None = None,
    **corpus: Any,
) -> dict[str, Any]:
    """Fit k-means to features of the train split of a corpus, and make a unit model folder. It needs the extra `fit`.

    Args:
        checkpoint: The speech encoder, as in `convert`.
        data_dir: The corpus, as in `prepare`. A sample of its test split is held out, and described beside that of the train split.
        unit_model_dir: The folder to make. A folder that was made from the same corpus and settings is left unchanged.
        num_units: Number of centroids, at most 65,536.
        layer: The layer, counted from 1, whose output becomes units, as in `convert`.
        num_frames: Number of frames (20 ms) of the sample. The features take 4 * num_frames * hidden_size bytes of memory, and as many
            in the cache. A smaller corpus is used as a whole.
        seed: Seed of the sample and of k-means, from 0 to 2**32 - 1.
        num_passes: How often k-means sees as many frames as the sample has.
        final_norm: As in `convert`.
        model_config: As in `convert`.
        device: Where to compute features; by default CUDA if available, else the CPU.
        precision: Precision of the features, as in `UnitTokenizer.from_pretrained`.
        cache_dir: Where features are kept; by default as in `prepare`.
        corpus: The fields of `PrepareConfig` that say how the corpus is read: train_metadata_path, test_metadata_path, agent,
            merge_speaker_turns and on_bad_audio.

    Returns:
        What "fit" in unit_model.json has: the sample, the settings, and under `sample` and `held_out` (None without a test split) the
        numbers of `usdm_sft.units.kmeans.describe_units`.

    Raises:
        FileNotFoundError: Data, a split list, an audio file or the checkpoint is missing.
        FileExistsError: The folder exists and has other content.
        ImportError: scikit-learn is not installed.
        ValueError: An option, audio or the checkpoint is wrong, or the corpus is too small. The message names the remedy.
    """
    _check_numbers(num_units, num_frames, seed, num_passes)
    kmeans.require_scikit_learn()
    folder, cache = Path(unit_model_dir).expanduser().resolve(), cache_root(cache_dir)
    _find_finished(folder, None)
    config = PrepareConfig(data_dir=data_dir, output_path=folder, precision=precision, cache_dir=cache, **corpus)
    source: dict[str, Any] = {"model_config": model_config, "layer": layer, "final_norm": final_norm}
    extractor = open_encoder(checkpoint, cache, **source, device=device, precision=precision)
    builder = open_corpus(config, cache)
    samples = _choose_samples(builder, num_units, num_frames, seed, extractor.framing)
    width = read_json(extractor.folder / "config.json")["hidden_size"]
    settings = {"num_units": num_units, "seed": seed, "num_passes": num_passes, **kmeans.SETTINGS}
    identity = [[[each.sha256 for each in part.recordings], part.num_frames] for part in samples]
    key = cache_key("kmeans", _VERSION, extractor.key, identity, settings)
    centroids = cache / "kmeans" / f"{key}.npy"
    with file_lock(centroids.parent / "locks" / key[:2]):
        record = _find_finished(folder, key)
        if record is None:
            record = {"key": key, **_describe(builder, samples[0], settings, extractor)}
            record |= _fit(samples, extractor, settings, width, cache, centroids)
            write_unit_model(checkpoint, centroids, folder, **source, record={"fit": record})
            _check_encoder(checkpoint, folder, extractor)
        centroids.unlink(missing_ok=True)  # also those of a killed run
    return record


def _check_encoder(checkpoint: str | Path, folder: Path, extractor: FeatureExtractor) -> None:
    """Check that the unit model has the encoder whose features the centroids were fit to, and remove it otherwise."""
    made, used = read_description(folder)["files"], extractor.description["files"]
    if any(made[name] != used[name] for name in ("config.json", "model.safetensors")):
        remove_path(folder)
        raise ValueError(f"{checkpoint} was changed during the run: let nothing write to it, and run again")


def _check_numbers(num_units: int, num_frames: int, seed: int, num_passes: int) -> None:
    if not 1 <= num_units <= MAX_UNITS:
        raise ValueError(f"num_units is {num_units:,}: give 1 to {MAX_UNITS:,}")
    if num_frames < num_units:
        raise ValueError(
            f"num_frames is {num_frames:,}, fewer than num_units, {num_units:,}: give at least one frame for each unit"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: give 0 to {2**32 - 1}")
    if num_passes < 1:
        raise ValueError(f"num_passes is {num_passes}: give a positive number")


def _find_finished(folder: Path, key: str | None) -> dict[str, Any] | None:
    """Return what the finished folder records, or None for one that can be written. With None as the key, any such folder will do.

    Raises:
        FileExistsError: The folder has other content.
        ValueError: The folder is finished, but a file was changed.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    found = read_description(folder).get("fit") if (folder / DESCRIPTION).is_file() else None
    if not isinstance(found, dict) or key not in (None, found.get("key")):
        raise FileExistsError(
            f"{folder} exists and was not fit with this corpus and these settings: remove it or name another folder"
        )
    if key is not None:
        unit_model_digest(folder)
    return found


def _choose_samples(
    builder: DailyTalkUSDM, num_units: int, num_frames: int, seed: int, framing: Framing
) -> tuple[Sample, Sample]:
    """Choose the sample for k-means from the train split, and a smaller one from the test split, if there is one.

    Raises:
        FileNotFoundError, AudioError: As `DailyTalkUSDM.screen_audio`.
        ValueError: There is no train split, or it has fewer frames than `num_units`.
    """
    splits, digests = builder.screen_audio()
    if _TRAIN not in splits:
        raise ValueError(
            f"the corpus has no {_TRAIN} split, only {', '.join(splits)}: name its list with --train_metadata_path"
        )
    audio = {
        name: {utterance.audio: digests[utterance.audio] for utterance in split.utterances()}
        for name, split in splits.items()
    }
    known = {digest.sha256 for digest in audio[_TRAIN].values()}
    unknown = {address: digest for address, digest in audio.get(_TEST, {}).items() if digest.sha256 not in known}
    sample = choose_sample(audio[_TRAIN], num_frames, seed, framing)
    if sample.num_frames < num_units:
        seconds = sum(each.num_samples for each in sample.recordings) / SAMPLE_RATE
        raise ValueError(
            f"num_units is {num_units:,}, but the {_TRAIN} split has only {count_noun(sample.num_frames, 'frame')} "
            f"({seconds:,.1f} s of audio): give {sample.num_frames:,} or less, or a larger corpus"
        )
    return sample, choose_sample(unknown, num_frames // HELD_OUT, seed, framing)


def choose_sample(audio: Mapping[str, AudioDigest], num_frames: int, seed: int, framing: Framing) -> Sample:
    """Choose recordings at random until they have `num_frames` frames, or all if there are fewer.

    The order is that of a hash of the seed and of the content of each recording. It does not depend on names or on the order of the
    corpus, and a smaller sample is the beginning of a larger one. A recording that occurs twice counts once, one that is too short for a frame not at all.

    Args:
        audio: Address -> digest of each recording.
        num_frames: Number of frames.
        seed: Another seed gives another order.
        framing: How the encoder cuts recordings into frames.
    """
    recordings = {
        digest.sha256: Recording(address, digest.sha256, digest.num_samples)
        for address, digest in audio.items()
        if framing.count(digest.num_samples)
    }
    chosen: list[Recording] = []
    total = 0
    for recording in _shuffle(recordings.values(), seed):
        if total >= num_frames:
            break
        chosen.append(recording)
        total += framing.count(recording.num_samples)
    return Sample(chosen, min(total, num_frames))


def _shuffle(recordings: Iterable[Recording], seed: int) -> list[Recording]:
    return sorted(recordings, key=lambda each: hashlib.sha256(f"{seed} {each.sha256}".encode()).digest())


def _describe(
    builder: DailyTalkUSDM, sample: Sample, settings: Mapping[str, Any], extractor: FeatureExtractor
) -> dict[str, Any]:
    """Return how the centroids are made; no path is in it."""
    versions = {"dailytalk-usdm": __version__} | {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {
        "corpus": describe_corpus(builder.split_lists, builder.list_digests, builder.config.corpus),
        "corpus_digest": builder.content_digest,
        "split": _TRAIN,
        "num_recordings": len(sample.recordings),
        "num_frames": sample.num_frames,
        "algorithm": "sklearn.cluster.MiniBatchKMeans",
        **settings,
        **{name: extractor.settings[name] for name in ("device", "precision", "resampler")},
        "versions": versions,
    }


def _fit(
    samples: tuple[Sample, Sample],
    extractor: FeatureExtractor,
    settings: Mapping[str, Any],
    width: int,
    cache: Path,
    centroids: Path,
) -> dict[str, Any]:
    """Compute features, fit k-means and write the centroids; return the numbers about the units of both samples."""
    shards = [compute_features(part.recordings, extractor, cache) for part in samples]
    extractor.release()
    features = load_features(shards[0], samples[0].num_frames, width)
    num_units, num_passes = settings["num_units"], settings["num_passes"]
    logger.info("k-means: %s centroids, %s frames, %s passes", f"{num_units:,}", f"{len(features):,}", num_passes)
    fitted = kmeans.fit_kmeans(features, num_units, seed=settings["seed"], num_passes=num_passes)
    with write_then_replace(centroids, "wb") as file:
        np.save(file, fitted.cluster_centers_)
    described: dict[str, Any] = {
        "sample": kmeans.describe_units(features, fitted.labels_, fitted.cluster_centers_),
        "held_out": None,
    }
    if samples[1].num_frames:
        features = load_features(shards[1], samples[1].num_frames, width)
        described["held_out"] = kmeans.describe_units(features, fitted.predict(features), fitted.cluster_centers_)
    return described
