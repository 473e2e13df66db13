"""Problems of split lists and manifests, collected and reported together."""

from collections.abc import Sequence

MAX_PROBLEMS_SHOWN = 20
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
