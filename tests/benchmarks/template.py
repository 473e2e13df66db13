"""Template: pairs a second on one core, with as many pairs, words and units as DailyTalk has.

    python -m tests.benchmarks.template [--tokenizer FOLDER] [--pairs 21100]

The `.map` part is left out where datasets is not installed. Without --tokenizer the offline one is built.
"""

import argparse
import os
import tempfile

import numpy as np

from tests.benchmarks.common import WORDS, alternate, lengths, machine, table, timed
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.tokenizer import NUM_UNITS, load_tokenizer

VOCABULARY = [
    "the",
    "you",
    "to",
    "i",
    "a",
    "and",
    "it",
    "is",
    "of",
    "that",
    "in",
    "what",
    "do",
    "have",
    "for",
    "we",
    "can",
    "your",
    "this",
    "be",
    "with",
    "are",
    "on",
    "not",
    "my",
    "at",
    "me",
    "so",
    "but",
    "good",
    "go",
    "like",
    "know",
    "how",
    "about",
    "time",
    "see",
    "there",
    "please",
    "really",
    "would",
    "think",
    "want",
    "just",
    "some",
    "very",
    "well",
    "here",
    "right",
    "come",
    "work",
    "day",
    "tomorrow",
    "coffee",
    "restaurant",
    "weather",
    "expensive",
    "actually",
    "definitely",
    "appointment",
    "wonderful",
]


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
    runs = {"encoder alone": lambda: timed(lambda: encoder(columns))}
    try:
        from datasets import Dataset, disable_progress_bars
    except ImportError:
        print("datasets is not installed: .map is left out")
    else:
        disable_progress_bars()
        folder = tempfile.TemporaryDirectory()
        Dataset.from_dict(columns).save_to_disk(folder.name)
        rows = Dataset.load_from_disk(folder.name)

        def mapped() -> None:
            options = {"batched": True, "remove_columns": rows.column_names, "load_from_cache_file": False}
            rows.with_format("numpy").map(encoder, cache_file_name=f"{folder.name}/out.arrow", **options)

        runs["through .map, Arrow file written"] = lambda: timed(mapped)
    times = alternate(runs, args.rounds)
    print(
        machine(),
        f"one core used; {args.pairs:,} pairs, {num_tokens:,} tokens; median of {args.rounds} rounds\n",
        sep="\n",
    )
    table(["", "s", "pairs / s"], [[name, f"{t:.2f}", f"{args.pairs / t:,.0f}"] for name, t in times.items()])


if __name__ == "__main__":
    main()
