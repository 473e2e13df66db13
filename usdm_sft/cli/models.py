"""The commands on models: `convert`, `fit` and `units` for unit models, `tokenizer` for base models."""

from __future__ import annotations

from collections.abc import Mapping
from json import dumps
from typing import Any, Literal

from usdm_sft.template.streams import StreamsName
from usdm_sft.units.settings import PrecisionName
from usdm_sft.utils.files import print_json
from usdm_sft.utils.texts import count_noun


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


def fit(
    checkpoint: str,
    data_dir: str,
    unit_model_dir: str,
    num_units: int = 10_000,
    layer: int = 35,
    num_frames: int = 1_000_000,
    seed: int = 0,
    num_passes: int = 10,
    final_norm: bool = False,
    model_config: str | None = None,
    train_metadata_path: str | None = None,
    test_metadata_path: str | None = None,
    agent: str | None = None,
    merge_speaker_turns: bool = False,
    on_bad_audio: Literal["error", "skip"] = "error",
    device: str | None = None,
    precision: PrecisionName = "fp32",
    cache_dir: str | None = None,
    json: bool = False,
) -> None:
    """Make a unit model folder with k-means centroids of its own, fit to the train split of a corpus.

    The sample consists of whole recordings that the seed chooses. Their features stay in the cache: an interrupted run goes on when the
    same command is given again, and another number of units needs no forward pass. It needs the extra fit, which brings scikit-learn.

    Examples:
        dailytalk-usdm fit hubert-base DailyTalk unit_model --layer 9 --num_units 500
        dailytalk-usdm fit hubert-base hub:USER/NAME unit_model --layer 9 --num_units 500 --num_frames 250000 --json

    Args:
        checkpoint: The speech encoder: a folder that transformers saved, or a .pt file of fairseq or fairseq2.
        data_dir: The corpus, as prepare takes it. If it has a test split, a sample of it is held out and described as well.
        unit_model_dir: The folder to make.
        num_units: Number of centroids, at most 65,536.
        layer: The layer, counted from 1, whose output becomes units: hidden_states[layer] of transformers.
        num_frames: Number of frames (20 ms) of the sample; less if the corpus has less. Their features take 4 bytes * frames * width of
            the model in memory, and as much in the cache (5.1 GB for a million frames of XLS-R 1B).
        seed: Seed of the sample and of k-means.
        num_passes: How often k-means sees as many frames as the sample has.
        final_norm: Apply the norm that follows the last layer of a model with pre-norm layers.
        model_config: The transformers config (JSON) of a .pt file. By default that of XLS-R 1B.
        train_metadata_path: Split list or manifest of the train split, as in prepare.
        test_metadata_path: Split list or manifest of the test split, as in prepare.
        agent: The speaker who is the agent. Required for dialogs with more than two speakers; otherwise all turns are used.
        merge_speaker_turns: Join neighbouring turns of one speaker. By default a dialog with such turns is left out, as in prepare.
        on_bad_audio: What to do with audio that cannot become units: error names every file; skip leaves out the pairs that use it.
        device: Where to compute features. By default CUDA where there is a GPU, else the CPU.
        precision: fp32 (as the reference), tf32, fp16, bf16, fp16x3 or bf16x3.
        cache_dir: Where features are kept. By default the folder dailytalk_usdm in HF_HOME.
        json: Print one JSON object, as under "fit" in unit_model.json.
    """
    from usdm_sft.prepare.fit_unit_model import fit_unit_model

    report = fit_unit_model(
        checkpoint,
        data_dir,
        unit_model_dir,
        num_units=num_units,
        layer=layer,
        num_frames=num_frames,
        seed=seed,
        num_passes=num_passes,
        final_norm=final_norm,
        model_config=model_config,
        device=device,
        precision=precision,
        cache_dir=cache_dir,
        train_metadata_path=train_metadata_path,
        test_metadata_path=test_metadata_path,
        agent=agent,
        merge_speaker_turns=merge_speaker_turns,
        on_bad_audio=on_bad_audio,
    )
    if json:
        print_json(report)
    else:
        print(_format_report(unit_model_dir, report))


def _format_report(unit_model_dir: str, report: Mapping[str, Any]) -> str:
    lines = [f"{unit_model_dir} is a unit model folder with {report['num_units']:,} units"]
    for name, title in (("sample", "sample"), ("held_out", "held out")):
        if report[name] is not None:
            lines.append(f"{title}: {_format_units(report[name])}")
    return "\n".join(lines)


def _format_units(numbers: Mapping[str, Any]) -> str:
    most, least = (
        ", ".join(f"{unit} ({count:,})" for unit, count in numbers[f"{end}_frequent"][:3]) for end in ("most", "least")
    )
    return (
        f"{count_noun(numbers['num_frames'], 'frame')}, inertia {numbers['inertia']:.6g} ({numbers['inertia_per_frame']:.6g} for each "
        f"frame), {count_noun(numbers['empty_clusters'], 'empty cluster')}, entropy {numbers['entropy']:.2f} bits (perplexity "
        f"{numbers['perplexity']:,.0f}), most frequent {most}, least frequent {least}"
    )


def units(
    unit_model_dir: str,
    file: list[str],
    device: str | None = None,
    precision: PrecisionName = "fp32",
    streams: StreamsName | None = None,
    num_streams: int | None = None,
    agreement: bool = False,
    json: bool = False,
) -> None:
    """Print the units of audio files, one JSON line per file; or how many of them another setting leaves equal.

    Examples:
        dailytalk-usdm units unit_model hello.wav goodbye.wav
        dailytalk-usdm units unit_model --precision bf16 *.wav
        dailytalk-usdm units unit_model --agreement *.wav

    Args:
        unit_model_dir: A unit model folder, or that of a codec of transformers.
        file: Audio files.
        device: Where to compute. By default CUDA where there is a GPU, else the CPU.
        precision: fp32 (as the reference), tf32, fp16, bf16, fp16x3 or bf16x3.
        streams: What is made of the streams of a codec: first (stream 0 alone) or flatten (all streams, frame by frame).
        num_streams: Number of streams of a codec to use, the first ones; by default all of them.
        agreement: Print a table instead: the share of units that equal those of each file alone in fp32 and with soxr, in batches,
            beside a longer utterance, in each other precision that the device offers, and with torchaudio.
        json: Print the table as one JSON object.
    """
    from usdm_sft.units.stream import stream_units
    from usdm_sft.units.tokenizer import UnitTokenizer

    if agreement and precision != "fp32":
        raise ValueError(f"--agreement measures every precision: leave out --precision {precision}")
    if json and not agreement:
        raise ValueError("--json is for the table: give --agreement as well (units are always printed as JSON lines)")
    tokenizer = UnitTokenizer.from_pretrained(
        unit_model_dir, device=device, precision=precision, streams=streams, num_streams=num_streams
    )
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
