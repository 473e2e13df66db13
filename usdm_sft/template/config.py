"""The words of the template and its labelled parts, as data: a variant of the template needs no new code.

Standard library only, so that the command line shows its options at once.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

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
EXPECTED_LOSS = f"a list of one or more of {', '.join(LABELS)}, such as [user_text, agent_text]"


@dataclass(frozen=True)
class Template:
    """The words of the template, the labelled parts of an exchange, and the form of tokenization.

    Args:
        instruction: Text before the first exchange, with its newline; not lower-cased.
        user_role: Name in the heading of the user's turn.
        agent_role: Name in the heading of the agent's turn.
        loss: Labelled parts, each with the stop token that follows it: user_text (with the newline), agent_text (with
            <|correspond|>), agent_units (with "▁", or with the newline where tokenization is separate). The reference labels all
            three; user_text alone trains recognition, agent_units alone synthesis.
        tokenization: reference for USTM's tokenizer: ids as of the whole text of a row. separate for the tokenizer of another base
            model: each line of text is encoded on its own, so that no newline becomes one token with the text before it.

    Raises:
        ValueError: A text contains a special token or a control character, or `loss` is empty or names an unknown part.
    """

    instruction: str = INSTRUCTION
    user_role: str = "User"
    agent_role: str = "Agent"
    loss: tuple[str, ...] = LABELS
    tokenization: Literal["reference", "separate"] = "reference"
    parts: ClassVar[tuple[str, ...]] = PARTS  # every exchange has all of them

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
        object.__setattr__(self, "loss", _check_loss(self.loss))

    @property
    def user_heading(self) -> str:
        return f"\n### {self.user_role}\n"

    @property
    def agent_heading(self) -> str:
        return f"### {self.agent_role}\n"

    def settings(self) -> dict[str, Any]:
        """The fields as JSON values. `tokenization` is left out where it is the reference's."""
        values = asdict(self) | {"loss": list(self.loss)}
        if self.tokenization == "reference":
            del values["tokenization"]
        return values


def _check_loss(loss: object) -> tuple[str, ...]:
    """The labelled parts in the order of an exchange."""
    if not isinstance(loss, list | tuple) or not loss:
        raise ValueError(f"template.loss is {loss!r}: give {EXPECTED_LOSS}")
    for part in loss:
        if part not in LABELS:
            raise ValueError(
                f"template.loss contains {part!r}, which cannot be labelled: name one or more of {', '.join(LABELS)}"
            )
    return tuple(part for part in LABELS if part in loss)


REFERENCE = Template()  # the template of the released model
