"""The command `convert`."""

from __future__ import annotations


def convert(
    checkpoint: str,
    kmeans: str,
    unit_model_dir: str,
    model_config: str | None = None,
    layer: int = 35,
    final_norm: bool = False,
) -> None:
    """Make a unit model folder from a wav2vec 2.0 or HuBERT checkpoint and k-means centroids.

    Examples:
        dailytalk-usdm convert xlsr2_1b_v2.pt kmeans_10k.npy unit_model
        dailytalk-usdm convert hubert-large kmeans.npy unit_model --layer 18

    Args:
        checkpoint: A folder that transformers saved, or a .pt file of fairseq or fairseq2.
        kmeans: A .npy file of float32 centroids, one per row, at most 65,536.
        unit_model_dir: The folder to make.
        model_config: The transformers config (JSON) of a .pt file. By default that of XLS-R 1B.
        layer: The layer, counted from 1, whose output becomes units: hidden_states[layer] of transformers.
        final_norm: Apply the norm that follows the last layer of a model with pre-norm layers (for a k-means that was fit on
            last_hidden_state, or on hidden_states[-1] of transformers before mid-2026).
    """
    from usdm_sft.units.convert import convert

    folder = convert(checkpoint, kmeans, unit_model_dir, model_config=model_config, layer=layer, final_norm=final_norm)
    print(f"{folder} is a unit model folder")
