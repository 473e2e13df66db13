"""Checks of the unit model and the tokenizer: here and in order, or to be downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

from usdm_sft.cli.doctor_findings import Finding, Needs
from usdm_sft.cli.doctor_hub import TIMEOUT
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.template.config import OFFLINE
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.tokenizer import load_tokenizer
from usdm_sft.units.folder import DESCRIPTION, FILES, read_description, unit_model_digest
from usdm_sft.units.published import CONVERTED_BYTES, PUBLISHED, PUBLISHED_FILES, PUBLISHED_URL, locate_unit_model
from usdm_sft.utils.download import remote_size
from usdm_sft.utils.texts import format_bytes


def check_unit_model(config: PrepareConfig, needs: Needs) -> Iterator[Finding]:
    """Check the files of the unit model, or find out how large its download is."""
    name = str(config.unit_model)
    folder = locate_unit_model(name, config.model_cache_dir)
    if folder is not None:
        unit_model_digest(folder, config.cache_dir)
        description = read_description(folder)
        text = f"{folder} is complete: layer {description['layer']}, {description['num_units']:,} units"
        yield Finding("ok", "unit model", text)
    elif name == PUBLISHED:
        size = sum(remote_size(f"{PUBLISHED_URL}/{file}", timeout=TIMEOUT) for file in PUBLISHED_FILES)
        needs.model_bytes = size + CONVERTED_BYTES
        yield _to_download("unit model", name, size)
    elif not needs.online:
        yield _unreachable("unit model", name, "--unit_model and a folder")
    else:
        try:
            size = needs.model_bytes = sum(_size_on_hub(name, file) for file in (DESCRIPTION, *FILES))
            yield _to_download("unit model", name, size)
        except EntryNotFoundError:
            text = f"the repository {name} holds no {DESCRIPTION}: upload a folder that 'dailytalk-usdm convert' made"
            yield Finding("error", "unit model", text)


def check_tokenizer_source(config: PrepareConfig, needs: Needs) -> Iterator[Finding]:
    """Load the tokenizer if it is on this machine, or find out how large its download is."""
    name = str(config.pretrained_model_name_or_path)
    folder: str | None = name
    if name != OFFLINE and not Path(name).is_dir():
        cached = try_to_load_from_cache(name, "tokenizer.json", cache_dir=config.model_cache_dir)
        folder = str(Path(cached).parent) if isinstance(cached, str) else None
    if folder is not None:
        encoder = TemplateEncoder(load_tokenizer(folder), config.template)
        ids = "gives the ids of the reference, for" if config.template.tokenization == "reference" else "has tokens for"
        yield Finding("ok", "tokenizer", f"{name} {ids} {encoder.num_units:,} units")
    elif not needs.online:
        yield _unreachable("tokenizer", name, f"--pretrained_model_name_or_path and a folder, or {OFFLINE}")
    else:
        yield _to_download("tokenizer", name, _size_on_hub(name, "tokenizer.json"))


def _size_on_hub(repository: str, file: str) -> int:
    metadata = get_hf_file_metadata(hf_hub_url(repository, file), token=get_token(), timeout=TIMEOUT)
    return metadata.size or 0


def _to_download(subject: str, name: str, size: int) -> Finding:
    text = f"{name} is not on this machine yet: prepare downloads it once ({format_bytes(size)})"
    return Finding("ok", subject, text)


def _unreachable(subject: str, name: str, option: str) -> Finding:
    """The error for a source that is neither on this machine nor to be fetched."""
    text = (
        f"{name} is not on this machine, and nothing can be fetched: run prepare once with a network, or give {option}"
    )
    return Finding("error", subject, text)
