import numpy as np
import pytest
import torch

from usdm_sft.training import REFERENCE_STAGES, StepLogitsProcessor, next_prompt

ROW = {
    "user_units": [[11, 12, 13]],
    "user_text": ["Where were you?"],
    "agent_text": ["at home."],
    "agent_units": [[21, 22, 22, 23]],
}


def test_prompts_are_prefixes_of_the_training_ids(encoder):
    units, user, agent = ROW["user_units"][0], ROW["user_text"][0], ROW["agent_text"][0]
    ids = encoder(ROW)["input_ids"][0].tolist()
    labels = encoder(ROW)["labels"][0].tolist()
    prompts = [encoder.prompt(units), encoder.prompt(units, user), encoder.prompt(units, user, agent)]
    for prompt, step in zip(prompts, REFERENCE_STAGES, strict=True):
        assert ids[: len(prompt)] == prompt.tolist()
        stop = ids.index(step.stop_id, len(prompt))
        assert labels[len(prompt) : stop + 1] == ids[len(prompt) : stop + 1]  # the step generates labelled ids
        assert (
            labels[len(prompt) - 1] == -100 or step is REFERENCE_STAGES[2]
        )  # <|correspond|> is labelled as the end of the answer


def test_prompts_after_earlier_exchanges_are_prefixes_too(encoder):
    earlier = [([1], "hello?", "who is there?", [2, 2]), ([3], "it's me.", "oh.", [])]
    row = (ROW["user_units"][0], ROW["user_text"][0], ROW["agent_text"][0], ROW["agent_units"][0])
    columns = ("user_units", "user_text", "agent_text", "agent_units")
    for num in (1, 2):
        exchanges = [*earlier[:num], row]
        batch = {name: [list(values)] for name, values in zip(columns, zip(*exchanges, strict=True), strict=True)}
        ids = encoder(batch)["input_ids"][0].tolist()
        for given, step in zip((row[:1], row[:2], row[:3]), REFERENCE_STAGES, strict=True):
            prompt = encoder.prompt(*given, history=earlier[:num]).tolist()
            assert ids[: len(prompt)] == prompt
            rest = ids[len(prompt) :]
            assert rest.count(2) == 1 and step.stop_id in rest
    with pytest.raises(ValueError, match="user_text 'a\\\\tb' holds the control character"):
        encoder.prompt([1], history=[([1], "a\tb", "c", [2])])


def test_answer_to_an_empty_transcript(encoder, tokenizer):
    text = encoder.decode(encoder.prompt(np.array([1, 1], np.uint16), ""))
    assert text.endswith("<|correspond|>\n### Agent\n")


def test_bad_prompts(encoder):
    with pytest.raises(ValueError, match="agent_text comes without user_text: give user_text as well"):
        encoder.prompt([1], agent_text="yes.")
    with pytest.raises(ValueError, match="agent_text '' is empty or white space only: correct the text"):
        encoder.prompt([1], "hm.", "")
    with pytest.raises(ValueError, match="user_units contains unit 10000"):
        encoder.prompt([10_000])
    with pytest.raises(ValueError, match="user_text 'a\\\\tb' holds the control character"):
        encoder.prompt([1], "a\tb")


def allowed(step):
    scores = StepLogitsProcessor(step)(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 42_003))
    return set(torch.isfinite(scores[0]).nonzero().flatten().tolist())


def test_ids_that_each_step_may_generate():
    transcript, answer, speech = map(allowed, REFERENCE_STAGES)
    assert transcript == set(range(32_000))
    assert answer == set(range(32_002))
    assert speech == {28_705, *range(32_002, 42_003)}
    assert [step.stop_id for step in REFERENCE_STAGES] == [13, 32_001, 28_705]


def test_next_prompt_after_nothing_or_a_cut_off(encoder):
    prompt = torch.tensor(encoder.prompt([1]))[None].long()
    empty = next_prompt(REFERENCE_STAGES[0], prompt, torch.tensor([13]))
    assert empty[0].tolist()[-5:] == [32_001, 13, 27_332, 23_393, 13]
    assert torch.equal(next_prompt(REFERENCE_STAGES[0], prompt, torch.tensor([], dtype=torch.long)), empty)
    assert next_prompt(REFERENCE_STAGES[1], empty, torch.tensor([5081]))[0].tolist()[-2:] == [5081, 32_001]
