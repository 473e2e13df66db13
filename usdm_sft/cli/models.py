"""The commands on models: `convert` and `units` for unit models, `tokenizer` for base models."""

from __future__ import annotations

from json import dumps

from usdm_sft.units.settings import PrecisionName
from usdm_sft.utils.files import print_json


def convert(
    checkpoint: str,
    kmeans: str,
    unit_model_dir: str,
    model_config: str | None = None,
    layer: int = 35,
    final_norm: bool = False,
) -> None:
    """Make a unit model folder from a speech encoder and k-means centroids: wav2vec 2.0, HuBERT, WavLM, data2vec-audio, w2v-BERT 2.0.

    Examples:
        dailytalk-usdm convert xlsr2_1b_v2.pt kmeans_10k.npy unit_model
        dailytalk-usdm convert hubert-large kmeans.npy unit_model --layer 18
        dailytalk-usdm convert w2v-bert-2.0 kmeans.npy unit_model --layer 16

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


def units(
    unit_model_dir: str,
    file: list[str],
    device: str | None = None,
    precision: PrecisionName = "fp32",
    agreement: bool = False,
    json: bool = False,
) -> None:
    """Print the units of audio files, one JSON line per file; or how many of them another setting leaves equal.

    Examples:
        dailytalk-usdm units unit_model hello.wav goodbye.wav
        dailytalk-usdm units unit_model --precision bf16 *.wav
        dailytalk-usdm units unit_model --agreement *.wav

    Args:
        unit_model_dir: A unit model folder.
        file: Audio files.
        device: Where to compute. By default CUDA where there is a GPU, else the CPU.
        precision: fp32 (as the reference), tf32, fp16, bf16, fp16x3 or bf16x3.
        agreement: Print a table instead: the share of units that equal those of each file alone in fp32 and with soxr, in batches,
            beside a longer utterance, in each other precision that the device offers, and with torchaudio.
        json: Print the table as one JSON object.
    """
    from usdm_sft.units.tokenizer import UnitTokenizer, stream_units

    if agreement and precision != "fp32":
        raise ValueError(f"--agreement measures every precision: leave out --precision {precision}")
    tokenizer = UnitTokenizer.from_pretrained(unit_model_dir, device=device, precision=precision)
    if agreement:
        from usdm_sft.units.promise import measure

        found = measure(tokenizer, file)
        if json:
            print_json(found.describe())
        else:
            print("\n".join(found.table()))
        return
    for name, file_units in zip(file, stream_units(tokenizer, file), strict=True):
        print(dumps({"file": name, "units": file_units.tolist()}), flush=True)


def tokenizer(base: str, tokenizer_dir: str, num_units: int = 10_000) -> None:
    """Give the tokenizer of a base model the tokens for units.

    Prepare with this folder and --template.tokenization separate, or chat for a chat model. The page "Other base models" of the documentation shows how the
    embeddings of the model grow.

    Examples:
        dailytalk-usdm tokenizer Qwen/Qwen3-0.6B qwen-units --num_units 10000

    Args:
        base: A folder or a Hub repository with a tokenizer.json.
        tokenizer_dir: The folder to make; AutoTokenizer of transformers 4.57 and 5 opens it.
        num_units: Number of units of the unit model.
    """
    from pathlib import Path

    from usdm_sft.template.tokenizer import build_tokenizer, save_tokenizer
    from usdm_sft.utils.files import SUFFIX, remove_path, replace_path

    folder = Path(tokenizer_dir).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{tokenizer_dir} is not empty: name a new folder")
    built = build_tokenizer(base, num_units)
    unfinished = folder.with_name(folder.name + SUFFIX)
    remove_path(unfinished)
    save_tokenizer(built, unfinished)
    replace_path(unfinished, folder)
    first, last = (built.convert_tokens_to_ids(f"<|unit{unit}|>") for unit in (0, num_units - 1))
    print(f"{tokenizer_dir} has {len(built):,} tokens; units have the ids {first} to {last}")
