"""All checks of the set-up, in the order in which the doctor prints them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from usdm_sft.cli.doctor_corpus import check_corpus
from usdm_sft.cli.doctor_findings import Finding, Needs, run_check
from usdm_sft.cli.doctor_hub import check_hub
from usdm_sft.cli.doctor_machine import check_devices, check_disks, check_locks, check_packages
from usdm_sft.cli.doctor_sources import check_tokenizer_source, check_unit_model
from usdm_sft.prepare.config import PrepareConfig


def examine(config: PrepareConfig, *, has_corpus: bool, has_output: bool) -> Iterator[Finding]:
    """Check everything that a run of `prepare` needs. Nothing is downloaded, and no audio but a sample is read.

    Args:
        config: The options of the run.
        has_corpus: Whether the user named `data_dir`; otherwise no corpus is read.
        has_output: Whether the user named `output_path`; otherwise it is not looked at.

    Yields:
        The findings of one check after the other.
    """
    needs = Needs()
    yield from run_check("packages", check_packages)
    yield from run_check("device", partial(check_devices, config))
    yield from run_check("Hub", partial(check_hub, needs))
    yield from run_check("tokenizer", partial(check_tokenizer_source, config, needs))
    yield from run_check("unit model", partial(check_unit_model, config, needs))
    if has_corpus:
        yield from run_check("corpus", partial(check_corpus, config, needs))
    yield from run_check("disk", partial(check_disks, config, needs, has_output=has_output))
    yield from run_check("locks", partial(check_locks, config))
