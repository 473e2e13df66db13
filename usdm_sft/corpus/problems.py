"""Problems of split lists and manifests, collected and reported together."""

MAX_PROBLEMS_SHOWN = 20
MAX_PROBLEMS = 1000  # of what is no split list not every line is told


class CorpusError(ValueError):
    """Bad split lists. One line a problem, each with file, line, the offending value and the remedy."""

    def __init__(self, problems: list[str]):
        stopped = ", where reading stopped" if len(problems) >= MAX_PROBLEMS else ""
        super().__init__(tell_problems(problems) + stopped)
        self.problems = problems


def tell_problems(problems: list[str]) -> str:
    """One line a problem, the first 20 of them."""
    shown = problems[:MAX_PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more problems")
    return "\n".join(shown)


def note(problems: list[str], problem: str) -> None:
    """Add a problem; of what is no list at all, reading stops at the thousandth."""
    problems.append(problem)
    if len(problems) >= MAX_PROBLEMS:
        raise CorpusError(problems)
