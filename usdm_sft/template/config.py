"""What the template says and where loss falls, as data: a variant of the template is a config and no fork.

Standard library only, so that the command line can show its options at once.
"""

from dataclasses import dataclass

from usdm_sft.utils.texts import text_problem

USTM = "naver-ai/USTM"
OFFLINE = "mistral-common"  # as a name: the tokenizer that `build_tokenizer` makes
MAX_LENGTH = 8192

# naver-ai/usdm, preprocess/fine-tuning/dailytalk_single_turn.py
INSTRUCTION = (
    "Below is a conversation between the user and the agent. Each turn includes the user's speech and its corresponding "
    "transcript, along with the agent's response text and the corresponding speech.\n"
)
PARTS = ("user_text", "agent_text", "agent_units")
EXPECTED_LOSS = f"a list of one or more of {', '.join(PARTS)}, such as [user_text, agent_text]"


@dataclass(frozen=True)
class Template:
    """The words of the template, and which parts of an exchange bear loss.

    Args:
        instruction: What stands before the first exchange, newline and all; not lower-cased.
        user_role: Name in the heading of the user's turn.
        agent_role: Name in the heading of the agent's turn.
        loss: Parts that bear loss, each with the token at which inference stops after it: user_text (and the newline after
            it), agent_text (and the <|correspond|> after it), agent_units (and the "▁" after them). All three is the
            reference; user_text alone trains recognition, agent_units alone synthesis.

    Raises:
        ValueError: A text holds what would be a special token or end its line, or `loss` names no part or an unknown one.
    """

    instruction: str = INSTRUCTION
    user_role: str = "User"
    agent_role: str = "Agent"
    loss: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        for name in ("instruction", "user_role", "agent_role"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"template.{name} is {getattr(self, name)!r}: give a text")
        for line in self.instruction.split("\n"):
            if line.strip() and (problem := text_problem(line)):
                raise ValueError(f"template.instruction {problem}: take it out")
        for name in ("user_role", "agent_role"):
            if problem := text_problem(getattr(self, name)):
                raise ValueError(f"template.{name} {getattr(self, name)!r} {problem}: give one line of plain text")
        if not isinstance(self.loss, list | tuple) or not self.loss:
            raise ValueError(f"template.loss is {self.loss!r}: give {EXPECTED_LOSS}")
        for part in self.loss:
            if part not in PARTS:
                raise ValueError(
                    f"template.loss holds {part!r}, which is no part that can bear loss: "
                    f"name one or more of {', '.join(PARTS)}"
                )
        object.__setattr__(
            self, "loss", tuple(part for part in PARTS if part in self.loss)
        )  # one spelling, one cache key

    @property
    def user_heading(self) -> str:
        return f"\n### {self.user_role}\n"

    @property
    def agent_heading(self) -> str:
        return f"### {self.agent_role}\n"


REFERENCE = Template()  # what the released model was trained on
