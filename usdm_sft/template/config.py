"""The words of the template and its labelled parts, as data: a variant of the template needs no new code.

Standard library only, so that the command line shows its options at once.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from usdm_sft.utils.texts import text_problem

USTM = "naver-ai/USTM"
OFFLINE = "mistral-common"  # the name of the tokenizer that `build_tokenizer` makes offline
MAX_LENGTH = 8192
MAX_UNITS = 65_536  # units are stored as uint16

# naver-ai/usdm, preprocess/fine-tuning/dailytalk_single_turn.py
INSTRUCTION = (
    "Below is a conversation between the user and the agent. Each turn includes the user's speech and its corresponding "
    "transcript, along with the agent's response text and the corresponding speech.\n"
)
PARTS = ("user_units", "user_text", "agent_text", "agent_units")  # in the order of an exchange
LABELS = PARTS[1:]  # the user's speech is never labelled
TOKENIZATIONS = ("reference", "separate", "chat")
UnitRepetition = Literal["keep", "collapse"]
EXPECTED_LOSS = f"a list of one or more of {', '.join(LABELS)}, such as [user_text, agent_text]"
EXPECTED_PARTS = f"a list of two or more of {', '.join(PARTS)}, such as [user_units, user_text]"


@dataclass(frozen=True)
class Template:
    """The words of the template, the parts of an exchange, those that are labelled, and the form of tokenization.

    Args:
        instruction: Text before the first exchange, with its newline; not lower-cased.
        user_role: Name in the heading of the user's turn.
        agent_role: Name in the heading of the agent's turn.
        loss: Labelled parts, each with the stop token that follows it: user_text (with the newline), agent_text (with
            <|correspond|>, or with the newline where no speech follows), agent_units (with "▁", or with the newline where tokenization
            is separate; in a chat template a special token follows each). By default every part but the first, which is given to the model; for the reference these are all three.
        tokenization: reference for USTM's tokenizer: ids as of the whole text of a row. separate for the tokenizer of another base
            model: each line of text is encoded on its own, so that no newline becomes one token with the text before it. chat for the
            chat template of a base model: the instruction is its system message, and the roles are user and assistant.
        parts: Parts of an exchange: user_units, user_text, agent_text, agent_units. The reference has all four. Two or more of them
            make another task, such as [user_units, user_text] for recognition.
        lowercase: Whether texts are lower-cased, as in the reference. False keeps them as the corpus has them.

    Raises:
        ValueError: A value is of another type, a text contains a special token or a control character, `parts` are fewer than two or unknown, or `loss` is empty
            or names a part that the model does not generate.
    """

    instruction: str = INSTRUCTION
    user_role: str = "User"
    agent_role: str = "Agent"
    loss: tuple[str, ...] | None = None
    tokenization: Literal["reference", "separate", "chat"] = "reference"
    parts: tuple[str, ...] = PARTS
    lowercase: bool = True

    def __post_init__(self) -> None:
        for name in ("instruction", "user_role", "agent_role"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"template.{name} is {getattr(self, name)!r}: give a text")
        if not isinstance(self.lowercase, bool):
            raise ValueError(f"template.lowercase is {self.lowercase!r}: give True or False")
        for line in self.instruction.split("\n"):
            if line.strip() and (problem := text_problem(line)):
                raise ValueError(f"template.instruction {problem}: remove it")
        for name in ("user_role", "agent_role"):
            if problem := text_problem(getattr(self, name)):
                raise ValueError(f"template.{name} {getattr(self, name)!r} {problem}: give one line of plain text")
        if self.tokenization not in TOKENIZATIONS:
            raise ValueError(f"template.tokenization is {self.tokenization!r}: give one of {', '.join(TOKENIZATIONS)}")
        if self.tokenization == "chat" and (self.user_role, self.agent_role) != ("User", "Agent"):
            raise ValueError(
                "template.user_role and agent_role are not in a chat template, whose roles are user and assistant: leave them out"
            )
        # Equal settings give equal cache keys.
        object.__setattr__(self, "parts", _check_parts(self.parts))
        object.__setattr__(self, "loss", _check_loss(self.loss, self.parts))

    @property
    def labelled(self) -> tuple[str, ...]:
        """The labelled parts: `loss`, which has its default by now."""
        assert self.loss is not None
        return self.loss

    @property
    def user_heading(self) -> str:
        return f"\n### {self.user_role}\n"

    @property
    def agent_heading(self) -> str:
        return f"### {self.agent_role}\n"

    def fold_case(self, text: str) -> str:
        """Return a text of the corpus as the template has it."""
        # Follows the Unicode version of Python: 3.11 and later lower-case 40 letters that 3.10, which the reference used, does
        # not (U+2C2F, U+A7C0, U+A7D0, U+A7D6, U+A7D8 and 35 of Vithkuqi, all new in Unicode 14). DailyTalk has none of them.
        return text.lower() if self.lowercase else text

    def settings(self) -> dict[str, Any]:
        """The fields as JSON values. `tokenization`, `parts` and `lowercase` are left out where they are the reference's."""
        values = asdict(self) | {"loss": list(self.labelled), "parts": list(self.parts)}
        if self.tokenization == "reference":
            del values["tokenization"]
        if self.parts == PARTS:
            del values["parts"]
        if self.lowercase:
            del values["lowercase"]
        return values


def _check_parts(parts: object) -> tuple[str, ...]:
    """The parts in the order of an exchange."""
    if not isinstance(parts, list | tuple) or len({*map(str, parts)}) < 2:
        raise ValueError(f"template.parts is {parts!r}: give {EXPECTED_PARTS}")
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"template.parts contains {part!r}: give {EXPECTED_PARTS}")
    return tuple(part for part in PARTS if part in parts)


def _check_loss(loss: object, parts: tuple[str, ...]) -> tuple[str, ...]:
    """The labelled parts in the order of an exchange; all that the model generates where `loss` is None."""
    generated = parts[1:]  # the first part is given
    if loss is None:
        return generated
    if not isinstance(loss, list | tuple) or not loss:
        raise ValueError(f"template.loss is {loss!r}: give {EXPECTED_LOSS}")
    for part in loss:
        if part not in generated:
            reason = "" if parts == PARTS else f" with template.parts {', '.join(parts)}"
            raise ValueError(
                f"template.loss contains {part!r}, which cannot be labelled{reason}: name one or more of {', '.join(generated)}"
            )
    return tuple(part for part in generated if part in loss)


REFERENCE = Template()  # the template of the released model
