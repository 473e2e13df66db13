import pytest

from usdm_sft.template.config import Template
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.parts import ROW_PARTS, find_parts


@pytest.mark.parametrize("part", ["user_text", "agent_text", "agent_units"])
def test_parts_are_those_that_the_template_labels(tokenizer, part):
    """A template that labels one part alone tells which tokens belong to it."""
    encoder = TemplateEncoder(tokenizer, Template(user_role="The caller", loss=(part,)))
    columns = {
        "user_units": [[[5, 5, 7], [1]]],
        "user_text": [["Hi, who?", "▁ ok"]],
        "agent_text": [["Yes.", "### User"]],
        "agent_units": [[[3], [4, 4]]],
    }
    encoded = encoder(columns)
    found = find_parts(encoded["input_ids"][0])
    assert (found == list(ROW_PARTS).index(part)).tolist() == (encoded["labels"][0] != -100).tolist()


def test_user_units_end_with_correspond_and_the_rest_is_frame(encoder):
    columns = {"user_units": [[5, 5, 7]], "user_text": ["hi"], "agent_text": ["yes"], "agent_units": [[3]]}
    ids = encoder(columns)["input_ids"][0].tolist()
    parts = find_parts(ids).tolist()
    assert [token for token, part in zip(ids, parts, strict=True) if part == 1] == [32007, 32007, 32009, 32001]
    assert parts[0] == parts[-1] == parts[-2] == 0
