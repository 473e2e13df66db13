"""The families of speech encoders and codecs that units can be made with, by the `model_type` of their config.json. Standard library only."""

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


class Codec(NamedTuple):
    """One family of codecs, whose codes are the units. The names are those of transformers.

    Attributes:
        extractor: Class of the feature extractor.
        sample_rate: Field of the config: the sample rate that the encoder takes, in Hz.
        step: Field of the config: samples from frame to frame.
        streams: Field of the config: number of streams, the codebooks of residual quantizers; None for one stream.
        argument: Argument of `encode` that chooses how many streams are computed; None where there is none.
        window: As in `usdm_sft.audio.frames.Framing`. Most codecs pad a last frame that is not whole.
    """

    extractor: str
    sample_rate: str
    step: str
    streams: str | None = None
    argument: str | None = None
    window: int = 1


# Xcodec2 and NeuCodec append a sample and pad to whole frames. NeuCodec leaves out the last one, which has too few log-mel frames.
CODECS = {
    "dac": Codec("DacFeatureExtractor", "sampling_rate", "hop_length", "n_codebooks", "n_quantizers"),
    "encodec": Codec("EncodecFeatureExtractor", "sampling_rate", "hop_length", "num_quantizers"),
    "mimi": Codec("EncodecFeatureExtractor", "sampling_rate", "frame_size", "num_quantizers", "num_quantizers"),
    "neucodec": Codec("NeuCodecFeatureExtractor", "input_sampling_rate", "encoder_hop_length", window=320),
    "wavtokenizer": Codec("WavTokenizerFeatureExtractor", "sampling_rate", "hop_length"),
    "xcodec": Codec("DacFeatureExtractor", "sample_rate", "hop_length", "num_quantizers"),
    "xcodec2": Codec("Xcodec2FeatureExtractor", "sampling_rate", "hop_length", window=0),
}


def family_of(values: Mapping[str, Any]) -> Family:
    """Return the family that `model_type` names in unit_model.json, which leaves it out for wav2vec 2.0 and HuBERT, or in config.json."""
    return FAMILIES[values.get("model_type", WAV2VEC2)]


def is_known(values: Mapping[str, Any]) -> bool:
    """Return whether `family_of` knows the family."""
    return values.get("model_type", WAV2VEC2) in tuple(FAMILIES)  # whatever type a JSON file has there


def is_codec(values: Mapping[str, Any]) -> bool:
    """Return whether the description of a unit model, or config.json, is of a codec."""
    return values.get("model_type") in tuple(CODECS)


def computes_batches(description: Mapping[str, Any]) -> bool:
    """Return whether a unit model computes several utterances together; the others are computed one utterance at a time."""
    return not is_codec(description) and family_of(description).in_batches


def takes_log_mel(values: Mapping[str, Any]) -> bool:
    """Return whether the family takes log-mel features, as `SeamlessM4TFeatureExtractor` makes them, and not a waveform."""
    return family_of(values).extractor == "SeamlessM4TFeatureExtractor"


def refuse_streams(streams: str | None, num_streams: int | None) -> None:
    """Check the options of a codec for a unit model that is none; a ValueError if one is given."""
    if given := [name for name, value in (("streams", streams), ("num_streams", num_streams)) if value is not None]:
        verb, them = ("is", "it") if len(given) == 1 else ("are", "them")
        raise ValueError(f"{' and '.join(given)} {verb} given, but the unit model is not a codec: leave {them} out")


def check_precision(description: Mapping[str, Any], precision: str) -> None:
    """Check the precision of a unit model.

    Raises:
        ValueError: Its family is not computed in this precision.
    """
    # The other precisions need layers of another type than transformers makes.
    if not computes_batches(description) and precision not in ("fp32", "tf32"):
        raise ValueError(
            f"precision {precision} does not exist for {description['model_type']} models, which transformers computes: "
            "use fp32, or tf32 on CUDA"
        )
