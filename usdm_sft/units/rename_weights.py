"""Parameter names of wav2vec 2.0 checkpoints in the layouts of fairseq and fairseq2 -> those of transformers' `Wav2Vec2Model`."""

import re
from typing import Any

_LAYER = r"encoder\.layers\.(\d+)\."
_CONV = "feature_extractor.conv_layers."
_POSITION = "encoder.pos_conv_embed.conv."
_FAIRSEQ = (
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.", _CONV + r"\1.conv."),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.", _CONV + r"\1.layer_norm."),
    (r"layer_norm\.", "feature_projection.layer_norm."),
    (r"post_extract_proj\.", "feature_projection.projection."),
    (r"encoder\.pos_conv\.0\.bias", _POSITION + "bias"),
    (r"encoder\.pos_conv\.0\.weight_g", _POSITION + "parametrizations.weight.original0"),
    (r"encoder\.pos_conv\.0\.weight_v", _POSITION + "parametrizations.weight.original1"),
    (_LAYER + r"self_attn\.", r"encoder.layers.\1.attention."),
    (_LAYER + r"self_attn_layer_norm\.", r"encoder.layers.\1.layer_norm."),
    (_LAYER + r"fc1\.", r"encoder.layers.\1.feed_forward.intermediate_dense."),
    (_LAYER + r"fc2\.", r"encoder.layers.\1.feed_forward.output_dense."),
    (_LAYER + r"final_layer_norm\.", r"encoder.layers.\1.final_layer_norm."),
    (r"encoder\.layer_norm\.", "encoder.layer_norm."),
)
_FAIRSEQ2 = (
    (r"encoder_frontend\.feature_extractor\.layers\.(\d+)\.(conv|layer_norm)\.", _CONV + r"\1.\2."),
    (r"encoder_frontend\.post_extract_layer_norm\.", "feature_projection.layer_norm."),
    (r"encoder_frontend\.model_dim_proj\.", "feature_projection.projection."),
    (r"encoder_frontend\.pos_encoder\.conv\.bias", _POSITION + "bias"),
    (r"encoder_frontend\.pos_encoder\.conv\.weight_g", _POSITION + "parametrizations.weight.original0"),
    (r"encoder_frontend\.pos_encoder\.conv\.weight_v", _POSITION + "parametrizations.weight.original1"),
    (_LAYER + r"self_attn\.output_proj\.", r"encoder.layers.\1.attention.out_proj."),
    (_LAYER + r"self_attn\.", r"encoder.layers.\1.attention."),
    (_LAYER + r"self_attn_layer_norm\.", r"encoder.layers.\1.layer_norm."),
    (_LAYER + r"ffn\.inner_proj\.", r"encoder.layers.\1.feed_forward.intermediate_dense."),
    (_LAYER + r"ffn\.output_proj\.", r"encoder.layers.\1.feed_forward.output_dense."),
    (_LAYER + r"ffn_layer_norm\.", r"encoder.layers.\1.final_layer_norm."),
    (r"encoder\.layer_norm\.", "encoder.layer_norm."),
)
# Parameters that only pre-training needs.
_UNUSED = re.compile(r"mask_emb|masker\.|quantizer\.|project_q\.|final_proj\.|final_target_proj\.")


def to_transformers(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters under transformers' names, without those that only pre-training needs.

    Raises:
        KeyError: A name belongs to neither layout.
    """
    layout = _FAIRSEQ2 if any(key.startswith("encoder_frontend.") for key in parameters) else _FAIRSEQ
    return {_rename(key, layout): value for key, value in parameters.items() if not _UNUSED.match(key)}


def _rename(key: str, layout: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in layout:
        if match := re.match(pattern, key):
            return match.expand(replacement) + key[match.end() :]
    raise KeyError(key)
