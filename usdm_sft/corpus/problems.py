"""Problems of split lists and manifests, collected and reported together."""

from collections.abc import Mapping, Sequence
from itertools import islice

MAX_PROBLEMS_SHOWN = 20
MAX_NAMED = 5  # names of a list that are given one by one
MAX_REASONS = 20
NUM_EXAMPLES = 3  # of a reason, where there are more
MAX_PROBLEMS = 1000  # reading stops here: a file with more problems is not a list at all


class CorpusError(ValueError):
    """Bad split lists or manifests. The message has one line per problem, with file, line, value and remedy.

    Args:
        problems: The problems, one line each; the message shows the first 20.
    """

    def __init__(self, problems: Sequence[str]):
        stopped = ", where reading stopped" if len(problems) >= MAX_PROBLEMS else ""
        super().__init__(join_problems(problems) + stopped)
        self.problems = list(problems)


def join_problems(problems: Sequence[str]) -> str:
    """Join the first 20 problems, one per line, and count the others."""
    shown = list(problems[:MAX_PROBLEMS_SHOWN])
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more problems")
    return "\n".join(shown)


def add_problem(problems: list[str], problem: str) -> None:
    """Add a problem to the list.

    Raises:
        CorpusError: This is the thousandth problem.
    """
    problems.append(problem)
    if len(problems) >= MAX_PROBLEMS:
        raise CorpusError(problems)


def describe_left_out(left_out: Mapping[str, str]) -> str:
    """Name each dialog that was left out with its reason; of more than five, the number and three examples of each of up to 20 reasons."""
    if len(left_out) <= MAX_NAMED:
        return ", ".join(f"{dialog}: {reason}" for dialog, reason in left_out.items())
    dialogs: dict[str, list[str]] = {}
    for dialog, reason in left_out.items():
        dialogs.setdefault(reason, []).append(dialog)
    named = [f"{reason}: {_name_some(names)}" for reason, names in islice(dialogs.items(), MAX_REASONS)]
    if more := len(left_out) - sum(map(len, islice(dialogs.values(), MAX_REASONS))):
        named.append(f"{more:,} more for other reasons")
    return "; ".join(named)


def count_reasons(reasons: Mapping[str, int]) -> str:
    """Name reasons with their numbers, such as "no text: 1,200, longer than max_seconds: 3"."""
    return ", ".join(f"{reason}: {number:,}" for reason, number in reasons.items())


def _name_some(names: Sequence[str]) -> str:
    return (
        f"{len(names):,}, such as {', '.join(names[:NUM_EXAMPLES])}" if len(names) > NUM_EXAMPLES else ", ".join(names)
    )
