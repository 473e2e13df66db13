"""Features of recordings, for which k-means is fit: the output of the layer, in the batches and with the settings of units.

They are kept in the cache, so that an interrupted run resumes. A feature shard holds the features of recordings of up to 20 minutes, one
row for each recording. Its key covers the sha256 of its recordings, the encoder, its settings and the version of the code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from usdm_sft.audio.digests import file_digests
from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.units.convert import convert, read_settings
from usdm_sft.units.model import UnitModel
from usdm_sft.units.stream import group_up_to
from usdm_sft.units.tokenizer import UnitTokenizer
from usdm_sft.units.transformers_model import TransformersModel
from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.files import write_then_replace
from usdm_sft.utils.locks import file_lock
from usdm_sft.utils.progress import AUDIO, progress_bar
from usdm_sft.utils.shard_cache import ShardCache, read_shard, write_shard

SHARD_SECONDS = 1_200  # of audio; 307 MB of features if they are 1,280 wide
_VERSION = "1"  # of the content of a feature shard; part of its key


class _Features:
    def nearest(self, features: torch.Tensor) -> torch.Tensor:
        """Return the float32 features themselves in place of units."""
        return features


class FeatureModel(_Features, UnitModel):
    """A `UnitModel` that returns features."""


class TransformersFeatureModel(_Features, TransformersModel):
    """A `TransformersModel` that returns features."""


class FeatureExtractor(UnitTokenizer):
    """Turns audio into features as a `UnitTokenizer` turns it into units: one (num_frames, hidden_size) float32 array for each recording."""

    def _load_model(self) -> UnitModel | TransformersModel:
        kind: type[UnitModel | TransformersModel] = FeatureModel if self.in_batches else TransformersFeatureModel
        return kind.from_pretrained(self.folder, self.settings["precision"], digest=self.digest)


class Recording(NamedTuple):
    """A recording to compute features of."""

    address: str
    sha256: str
    num_samples: int  # at 16 kHz


def open_encoder(
    checkpoint: str | Path,
    cache: Path,
    *,
    model_config: str | Path | None = None,
    layer: int,
    final_norm: bool = False,
    device: str | None = None,
    precision: str = "fp32",
) -> FeatureExtractor:
    """Open a checkpoint that has no k-means yet. It is converted in the folder `cache` once, with one centroid that nobody uses.

    The other arguments are those of `convert` and `UnitTokenizer.from_pretrained`.
    """
    config, settings, sources = read_settings(Path(checkpoint).expanduser(), model_config, layer, final_norm=final_norm)
    digests = file_digests([str(path.resolve()) for path in sources.values()], cache)
    folder = cache / "encoders" / cache_key(_VERSION, config, settings, dict(zip(sources, digests, strict=True)))
    unused = folder.with_name(f"{folder.name}.npy")
    with file_lock(folder.parent / "locks" / folder.name[:2]):
        if not folder.is_dir():
            with write_then_replace(unused, "wb") as file:
                np.save(file, np.zeros((1, config["hidden_size"]), np.float32))
            convert(checkpoint, unused, folder, model_config=model_config, layer=layer, final_norm=final_norm)
        unused.unlink(missing_ok=True)  # also that of a killed run
    return FeatureExtractor.from_pretrained(folder, device, precision, cache_dir=cache)


def compute_features(recordings: Sequence[Recording], extractor: FeatureExtractor, cache: Path) -> list[Path]:
    """Compute the features of recordings, except those that the cache has.

    Args:
        recordings: Recordings with different sha256. The same ones in the same order are found in the cache.
        extractor: The encoder.
        cache: Folder of the cache.

    Returns:
        The feature shards, which have the recordings in order.

    Raises:
        AudioError: A recording cannot be read, or was changed.
        ValueError: The features of a recording are not finite.
    """
    level = ShardCache(cache / "features")
    shards = {
        cache_key("features", _VERSION, extractor.key, [each.sha256 for each in shard]): shard
        for shard in group_up_to(SHARD_SECONDS * SAMPLE_RATE, recordings, lambda recording: recording.num_samples)
    }
    files = level.find_all(shards)
    missing = [key for key in shards if key not in files]
    seconds = {key: sum(each.num_samples for each in shards[key]) / SAMPLE_RATE for key in missing}
    try:
        with progress_bar(sum(seconds.values()), "features", AUDIO, disable=not missing) as bar:
            for index, key in enumerate(missing):
                for each in missing[index : index + 2]:
                    extractor.read_ahead(*_name_sources(shards[each]))
                files[key] = level.make(key, partial(_write, extractor, shards[key]))
                extractor.forget(_name_sources(shards[key])[0])  # if another run has made the shard
                bar.update(seconds[key])
    finally:
        extractor.end_reader()
    return [files[key] for key in shards]


def _name_sources(shard: Sequence[Recording]) -> tuple[list[str], dict[str, str]]:
    return [each.address for each in shard], {each.address: each.sha256 for each in shard}


def _write(extractor: FeatureExtractor, shard: Sequence[Recording], path: str) -> None:
    features, _ = extractor.start_files(*_name_sources(shard))()
    write_shard({"features": [each.reshape(-1) for each in features]}, path)


def load_features(shards: Iterable[Path], num_frames: int, width: int) -> np.ndarray:
    """Return the first `num_frames` frames of feature shards, a (num_frames, width) float32 array in memory."""
    features = np.empty(num_frames * width, np.float32)
    end = 0
    for chunk in chain.from_iterable(read_shard(path)["features"].chunks for path in shards):
        values = chunk.flatten().to_numpy()[: len(features) - end]
        features[end : end + len(values)] = values
        end += len(values)
    if end < len(features):
        raise ValueError(f"the feature shards hold {end // width:,} frames, not {num_frames:,}")
    return features.reshape(num_frames, width)
