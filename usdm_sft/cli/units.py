"""The command `units`."""

from __future__ import annotations

import json

from usdm_sft.units.settings import PrecisionName


def units(unit_model_dir: str, file: list[str], device: str | None = None, precision: PrecisionName = "fp32") -> None:
    """Print the units of audio files, one JSON line per file.

    Examples:
        dailytalk-usdm units unit_model hello.wav goodbye.wav
        dailytalk-usdm units unit_model --precision bf16 *.wav

    Args:
        unit_model_dir: A unit model folder.
        file: Audio files.
        device: Where to compute. By default CUDA where there is a GPU, else the CPU.
        precision: fp32 (as the reference), tf32, fp16, bf16, fp16x3 or bf16x3.
    """
    from usdm_sft.units.stream import stream_units
    from usdm_sft.units.tokenizer import UnitTokenizer

    tokenizer = UnitTokenizer.from_pretrained(unit_model_dir, device=device, precision=precision)
    for name, file_units in zip(file, stream_units(tokenizer, file), strict=True):
        print(json.dumps({"file": name, "units": file_units.tolist()}), flush=True)
