"""The words and parts of the template, as data: a variant of the template needs no new code.

Standard library only, so that the command line shows its options at once.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from usdm_sft.utils.texts import text_problem

USTM = "naver-ai/USTM"
OFFLINE = "mistral-common"  # the name of the tokenizer that `build_tokenizer` makes offline
MAX_LENGTH = 8192

# naver-ai/usdm, preprocess/fine-tuning/dailytalk_single_turn.py
INSTRUCTION = (
    "Below is a conversation between the user and the agent. Each turn includes the user's speech and its corresponding "
    "transcript, along with the agent's response text and the corresponding speech.\n"
)
PARTS = ("user_units", "user_text", "agent_text", "agent_units")  # in the order of an exchange
LABELS = PARTS[1:]  # the user's speech is never labelled
TOKENIZATIONS = ("reference", "separate")
EXPECTED_PARTS = "a list of names, such as [user_text, agent_text]"


@dataclass(frozen=True)
class Template:
    """The words of the template, the parts of an exchange, and those that are labelled.

    Args:
        instruction: Text before the first exchange, with its newline; not lower-cased.
        user_role: Name in the heading of the user's turn.
        agent_role: Name in the heading of the agent's turn.
        parts: Parts of an exchange: some of user_units, user_text, agent_text and agent_units, at least two. The reference has all
            four. [user_units, user_text] is recognition, [agent_text, agent_units] synthesis, [user_units, agent_text] answers in text.
        loss: Labelled parts, each with the stop token that follows it: user_text (with the newline), agent_text (with
            <|correspond|>), agent_units (with "▁", or with the newline where tokenization is separate). By default all parts
            but the first, as in the reference.
        tokenization: reference for USTM's tokenizer: ids as of the whole text of a row. separate for the tokenizer of another base
            model: each line of text is encoded on its own, so that no newline becomes one token with the text before it.

    Raises:
        ValueError: A text contains a special token or a control character, or `parts` or `loss` name an unknown part or too few.
    """

    instruction: str = INSTRUCTION
    user_role: str = "User"
    agent_role: str = "Agent"
    loss: tuple[str, ...] | None = None
    parts: tuple[str, ...] = PARTS
    tokenization: Literal["reference", "separate"] = "reference"

    def __post_init__(self) -> None:
        for name in ("instruction", "user_role", "agent_role"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"template.{name} is {getattr(self, name)!r}: give a text")
        for line in self.instruction.split("\n"):
            if line.strip() and (problem := text_problem(line)):
                raise ValueError(f"template.instruction {problem}: remove it")
        for name in ("user_role", "agent_role"):
            if problem := text_problem(getattr(self, name)):
                raise ValueError(f"template.{name} {getattr(self, name)!r} {problem}: give one line of plain text")
        if self.tokenization not in TOKENIZATIONS:
            raise ValueError(f"template.tokenization is {self.tokenization!r}: give {' or '.join(TOKENIZATIONS)}")
        # Equal settings give equal cache keys.
        object.__setattr__(self, "parts", _check_parts("parts", self.parts, PARTS))
        if len(self.parts) < 2:
            raise ValueError(
                f"template.parts is {list(self.parts)}: give at least two, what is given and what is learned"
            )
        allowed = tuple(part for part in LABELS if part in self.parts)
        loss = self.parts[1:] if self.loss is None else _check_parts("loss", self.loss, allowed)
        object.__setattr__(self, "loss", loss)

    @property
    def user_heading(self) -> str:
        return f"\n### {self.user_role}\n"

    @property
    def agent_heading(self) -> str:
        return f"### {self.agent_role}\n"

    @property
    def labelled(self) -> tuple[str, ...]:
        """The labelled parts, in order."""
        return self.loss or ()

    def settings(self) -> dict[str, Any]:
        """The fields as JSON values. `parts` and `tokenization` are left out where they are the reference's."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        for name in ("parts", "tokenization"):
            if getattr(self, name) == getattr(Template, name):
                del values[name]
        return values


def _check_parts(name: str, parts: object, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The parts in the order of an exchange."""
    if not isinstance(parts, list | tuple) or not parts:
        example = f"[{', '.join(allowed[:2])}]"
        raise ValueError(
            f"template.{name} is {parts!r}: give a list of one or more of {', '.join(allowed)}, such as {example}"
        )
    for part in parts:
        if part not in allowed:
            reason = "is not a part" if allowed == PARTS else "is left out" if part in LABELS else "cannot be labelled"
            raise ValueError(
                f"template.{name} contains {part!r}, which {reason}: name one or more of {', '.join(allowed)}"
            )
    return tuple(part for part in PARTS if part in parts)


REFERENCE = Template()  # the template of the released model
