"""Small codecs of each family with random weights, saved as they are published."""

import functools
import json

import torch
import transformers
from transformers import (
    DacConfig,
    EncodecConfig,
    HubertConfig,
    MimiConfig,
    Wav2Vec2BertConfig,
    XcodecConfig,
)

NUM_CODES = 64
_DAC = {"encoder_hidden_size": 8, "decoder_hidden_size": 16, "sampling_rate": 16_000, "codebook_size": NUM_CODES}
_STRIDES = {"downsampling_ratios": [2, 4, 5, 8], "upsampling_ratios": [8, 5, 4, 2]}
_LAYERS = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
_DECODER = _LAYERS | {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1}
_CODES = {"codebook_size": NUM_CODES, "codebook_dim": 16}


def _semantic(config):
    bert = Wav2Vec2BertConfig(**_LAYERS, num_hidden_layers=2, output_hidden_size=32)
    sizes = {"encoder_hidden_size": 4, "quantization_dim": 64, "quantization_levels": [4, 4, 4]}
    return config(**_DECODER, **sizes, semantic_model_config=bert)


def _xcodec():
    hubert = HubertConfig(
        **_LAYERS, num_hidden_layers=2, conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4
    )
    acoustic = DacConfig(**_DAC, **_STRIDES, hidden_size=16)
    return XcodecConfig(
        acoustic_model_config=acoustic, semantic_model_config=hubert, target_bandwidths=[0.6, 1.2], **_CODES | {"codebook_dim": 48}
    )  # fmt: skip


# For each family: its config, and what its feature extractor is saved with.
CODECS = {
    "dac": (lambda: DacConfig(**_DAC, **_STRIDES, n_codebooks=3, codebook_dim=4), {"sampling_rate": 16_000, "hop_length": 320}),
    "encodec": (lambda: EncodecConfig(num_filters=4, hidden_size=16, **_CODES, target_bandwidths=[1.5, 3.0]), {}),
    "mimi": (
        lambda: MimiConfig(
            **_DECODER | {"num_hidden_layers": 2}, num_filters=4, **_CODES, vector_quantization_hidden_dimension=16, num_quantizers=4,
            upsample_groups=32,
        ),
        {},
    ),
    "neucodec": (lambda: _semantic(transformers.NeuCodecConfig), {"sampling_rate": 16_000, "hop_length": 320}),
    "wavtokenizer": (
        lambda: transformers.WavTokenizerConfig(
            num_filters=4, hidden_size=16, **_CODES, decoder_hidden_size=32, decoder_intermediate_size=32, decoder_num_layers=1
        ),
        {},
    ),
    "xcodec": (_xcodec, {"sampling_rate": 16_000, "hop_length": 320}),
    "xcodec2": (lambda: _semantic(transformers.Xcodec2Config), {"sampling_rate": 16_000, "hop_length": 320}),
}  # fmt: skip
EXTRACTORS = {
    "dac": "DacFeatureExtractor",
    "encodec": "EncodecFeatureExtractor",
    "mimi": "EncodecFeatureExtractor",
    "neucodec": "NeuCodecFeatureExtractor",
    "wavtokenizer": "WavTokenizerFeatureExtractor",
    "xcodec": "DacFeatureExtractor",
    "xcodec2": "Xcodec2FeatureExtractor",
}
LOG_MEL = ("neucodec", "xcodec2")


def save_codec(kind, folder):
    """Save a small codec and its feature extractor, and return the folder."""
    config, values = CODECS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config()).eval()
    _spread_codes(model)
    model.save_pretrained(folder)
    values = {"feature_extractor_type": EXTRACTORS[kind]} | ({} if values else {"sampling_rate": 24_000}) | values
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


@torch.no_grad()
def _spread_codes(model):
    """Make the codes of noise many different ones: the code vectors are frames of noise, each with other noise."""
    for name, values in model.named_parameters():
        if name.endswith("bias"):  # otherwise the features of all frames are about the same
            values.zero_()
    if hasattr(model, "fc_encoder"):  # its output is rounded to four levels
        model.fc_encoder.weight.mul_(3_000)
        return
    generator = torch.Generator().manual_seed(0)

    def fit(codebook, states):
        rows = states.reshape(-1, states.shape[-1])
        vectors = codebook._buffers.get(
            "embed", codebook._buffers.get("embed_sum")
        )  # the second in Mimi, as a sum of one vector
        picked = rows[torch.randint(len(rows), (len(vectors),), generator=generator)]
        vectors.copy_(picked + 0.3 * rows.std() * torch.randn(picked.shape, generator=generator))
        return type(codebook).quantize(codebook, states)

    # DAC has none, and its codes are spread without.
    codebooks = [each for each in model.modules() if {"embed", "embed_sum"} & each._buffers.keys()]
    for codebook in codebooks:
        codebook.quantize = functools.partial(fit, codebook)
    kept = {"bandwidth": max(model.config.target_bandwidths)} if hasattr(model.config, "target_bandwidths") else {}
    model.encode(0.1 * torch.randn(1, 1, 96_000, generator=generator), **kept)
    for codebook in codebooks:
        del codebook.quantize
