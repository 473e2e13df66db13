"""The families of speech encoders that units can be made with, by the `model_type` of their config.json. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """One family of encoders."""

    model: str  # class in transformers
    extractor: str  # class of the feature extractor in transformers
    in_batches: bool  # computed by `model.UnitModel`, in packs and padded batches; otherwise one utterance at a time by transformers


WAV2VEC2 = "wav2vec2"  # the type of a config without `model_type`, such as that of a .pt file
FAMILIES = {
    WAV2VEC2: Family("Wav2Vec2Model", "Wav2Vec2FeatureExtractor", in_batches=True),
    "hubert": Family("HubertModel", "Wav2Vec2FeatureExtractor", in_batches=True),
    "wavlm": Family("WavLMModel", "Wav2Vec2FeatureExtractor", in_batches=False),
    "data2vec-audio": Family("Data2VecAudioModel", "Wav2Vec2FeatureExtractor", in_batches=False),
    "wav2vec2-bert": Family("Wav2Vec2BertModel", "SeamlessM4TFeatureExtractor", in_batches=False),
}

# Precisions that need no layer of another type than transformers makes.
_PRECISIONS_ALONE = ("fp32", "tf32")


def family_of(values: Mapping[str, Any]) -> Family:
    """Return the family that `model_type` names in unit_model.json, which leaves it out for wav2vec 2.0 and HuBERT, or in config.json."""
    return FAMILIES[values.get("model_type", WAV2VEC2)]


def is_known(values: Mapping[str, Any]) -> bool:
    """Return whether `family_of` knows the family."""
    return values.get("model_type", WAV2VEC2) in tuple(FAMILIES)  # whatever type a JSON file has there


def takes_log_mel(values: Mapping[str, Any]) -> bool:
    """Return whether the family takes log-mel features, as `SeamlessM4TFeatureExtractor` makes them, and not a waveform."""
    return family_of(values).extractor == "SeamlessM4TFeatureExtractor"


def offers_precision(description: Mapping[str, Any], precision: str) -> bool:
    """Return whether the unit model of a unit_model.json can be computed in a precision, on a device that has it."""
    return family_of(description).in_batches or precision in _PRECISIONS_ALONE


def check_precision(description: Mapping[str, Any], precision: str) -> None:
    """Check the precision of a unit model.

    Raises:
        ValueError: Its family is not computed in this precision.
    """
    if not offers_precision(description, precision):
        raise ValueError(
            f"precision {precision} does not exist for {description['model_type']} models, which transformers computes: "
            "use fp32, or tf32 on CUDA"
        )
