"""Benchmark of the template: pairs per second on one core, with DailyTalk's number of pairs, words and units.

    python -m tests.benchmarks.template [--tokenizer FOLDER] [--pairs 21100]

By default the tokenizer is built offline.
"""

import argparse
import os
import tempfile

import numpy as np
from datasets import Dataset, disable_progress_bars

from tests.benchmarks.common import WORDS, alternate, lengths, machine, table, timed
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.tokenizer import NUM_UNITS, load_tokenizer

VOCABULARY = [
    "the", "you", "to", "i", "a", "and", "it", "is", "of", "that", "in", "what", "do", "have", "for", "we", "can",
    "your", "this", "be", "with", "are", "on", "not", "my", "at", "me", "so", "but", "good", "go", "like", "know",
    "how", "about", "time", "see", "there", "please", "really", "would", "think", "want", "just", "some", "very",
    "well", "here", "right", "come", "work", "day", "tomorrow", "coffee", "restaurant", "weather", "expensive",
    "actually", "definitely", "appointment", "wonderful",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="mistral-common")
    parser.add_argument("--pairs", type=int, default=21_100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rng = np.random.default_rng(0)

    def texts() -> list[str]:
        return [" ".join(rng.choice(VOCABULARY, max(1, rng.poisson(WORDS)))) + "." for _ in range(args.pairs)]

    def units(seed: int) -> list[np.ndarray]:
        return [
            rng.integers(NUM_UNITS, size=int(seconds * 50)).astype(np.uint16) for seconds in lengths(args.pairs, seed)
        ]

    columns = {"user_units": units(0), "user_text": texts(), "agent_text": texts(), "agent_units": units(1)}
    encoder = TemplateEncoder(load_tokenizer(args.tokenizer))
    num_tokens = sum(map(len, encoder(columns)["input_ids"]))
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        Dataset.from_dict(columns).save_to_disk(folder)
        rows = Dataset.load_from_disk(folder)

        def mapped() -> None:
            options = {"batched": True, "remove_columns": rows.column_names, "load_from_cache_file": False}
            rows.with_format("numpy").map(encoder, cache_file_name=f"{folder}/out.arrow", **options)

        runs = {
            "encoder alone": lambda: timed(lambda: encoder(columns)),
            "through .map, Arrow file written": lambda: timed(mapped),
        }
        times = alternate(runs, args.rounds)
    print(
        machine(),
        f"one core used; {args.pairs:,} pairs, {num_tokens:,} tokens; median of {args.rounds} rounds\n",
        sep="\n",
    )
    table(["", "s", "pairs / s"], [[name, f"{t:.2f}", f"{args.pairs / t:,.0f}"] for name, t in times.items()])


if __name__ == "__main__":
    main()
