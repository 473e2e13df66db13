"""Tokenizers of other base models get tokens for units."""

import json
import os

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.bases import BASES, byte_level, ids_of_transformers_4
from usdm_sft.cli.main import main
from usdm_sft.template.special_tokens import read_tokens
from usdm_sft.template.tokenizer import build_tokenizer, check_tokenizer, load_tokenizer, save_tokenizer

PROBES = ["yes?\nno! <|unit3|> where<|correspond|>were you<|unit0|>\n", " a  b\n\n", "<|unit19|><|continue|>"]


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    """A saved tokenizer of a base model."""
    folder = tmp_path_factory.mktemp("bases") / request.param
    BASES[request.param]().save_pretrained(folder)
    return folder


def test_new_tokens_follow_those_of_the_base_model(base):
    old, new = AutoTokenizer.from_pretrained(base), build_tokenizer(base, 20)
    names = ["<|correspond|>", "<|continue|>", *(f"<|unit{unit}|>" for unit in range(20))]
    assert new.convert_tokens_to_ids(names) == list(range(len(new) - 22, len(new)))
    assert all(new(text).input_ids == old(text).input_ids for text in ("where were you?", "at home."))
    assert new.pad_token is not None
    tokens = read_tokens(new)
    assert (tokens.num_units, tokens.unit_0, tokens.correspond) == (20, len(new) - 20, len(new) - 22)


def test_bos_and_eos_are_those_of_the_tokenizer(tmp_path):
    expected = {"byte-level": ("", "<|end|>"), "unigram": ("<s>", "</s>"), "word-piece": ("[CLS]", "")}
    for name, make in BASES.items():
        make().save_pretrained(tmp_path / name)
        built = build_tokenizer(tmp_path / name, 5)
        tokens = read_tokens(built)
        assert tuple("".join(built.convert_ids_to_tokens(list(ids))) for ids in tokens[:2]) == expected[name]
        assert built.convert_ids_to_tokens(tokens.newline) == ("Ċ" if name == "byte-level" else "\n")


def test_saved_tokenizer_gives_the_same_ids(base, tmp_path):
    built = build_tokenizer(base, 20)
    save_tokenizer(built, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert [loaded(text).input_ids for text in PROBES] == [built(text).input_ids for text in PROBES]
        assert (loaded.eos_token, loaded.pad_token, len(loaded)) == (built.eos_token, built.pad_token, len(built))


@pytest.mark.skipif("USDM_TRANSFORMERS_4" not in os.environ, reason="needs a Python with transformers 4.57 (.ci/run)")
def test_transformers_4_gives_the_same_ids(base, tmp_path):
    built = build_tokenizer(base, 20)
    save_tokenizer(built, tmp_path)
    assert ids_of_transformers_4(tmp_path, PROBES) == [len(built), [built(text).input_ids for text in PROBES]]


def test_command_makes_a_folder_that_prepare_takes(base, tmp_path, capsys, refused):
    (tmp_path / "precious").mkdir()
    (tmp_path / "out.unfinished").symlink_to(tmp_path / "precious")  # a link is removed, as what a killed run left
    main(["tokenizer", str(base), str(tmp_path / "out"), "--num_units", "20"])
    loaded = load_tokenizer(tmp_path / "out")
    first = loaded.convert_tokens_to_ids("<|unit0|>")
    assert capsys.readouterr().out == (
        f"{tmp_path / 'out'} has {len(loaded)} tokens; units have the ids {first} to {first + 19}\n"
    )
    assert list((tmp_path / "precious").iterdir()) == [] and not (tmp_path / "out.unfinished").is_symlink()
    assert "is not empty: name a new folder" in refused("tokenizer", base, tmp_path / "out")


@pytest.mark.parametrize("num_units", [0, -1, 65_537])
def test_number_of_units_is_checked(num_units):
    with pytest.raises(ValueError, match=f"num_units is {num_units}: give a number from 1 to 65536"):
        build_tokenizer(num_units=num_units)


@pytest.mark.parametrize("num_units", [1, 5, 100])
def test_few_units(num_units):
    assert check_tokenizer(build_tokenizer(num_units=num_units).backend_tokenizer).num_units == num_units


def test_base_that_has_units_already_is_refused(base, tmp_path):
    save_tokenizer(build_tokenizer(base, 5), tmp_path)
    message = r"has the token <\|correspond\|> already \(id \d+\): name the tokenizer of a base"
    with pytest.raises(ValueError, match=message):
        build_tokenizer(tmp_path, 5)


def test_probes_name_what_fails(tmp_path):
    tokenizer = byte_level()
    message = r"^this tokenizer has no <\|correspond\|>: add the tokens for units with `dai"
    with pytest.raises(ValueError, match=message):
        read_tokens(tokenizer)
    with_a_gap = "<|correspond|>", "<|continue|>", "<|unit0|>", "gap", "<|unit1|>"
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in with_a_gap])
    first = tokenizer.convert_tokens_to_ids("<|unit0|>")
    message = rf"has id {first + 2} for <\|unit1\|> instead of {first + 1}: the ids of units must"
    with pytest.raises(ValueError, match=message):
        read_tokens(tokenizer)

    # no added tokens: a text never becomes them
    vocab = {"<unk>": 0, "<|correspond|>": 1, "<|unit0|>": 2, "\n": 3, "<|continue|>": 4}
    split = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")))
    message = r"gives \[0\] for '<\|unit0\|>.*' instead of \[2, 1, 4\]: it does not read a token for units"
    with pytest.raises(ValueError, match=message):
        read_tokens(split)

    byte_level().save_pretrained(tmp_path / "base")
    serialized = json.loads(build_tokenizer(tmp_path / "base", 5).backend_tokenizer.to_str())
    serialized["normalizer"] = {"type": "Replace", "pattern": {"String": "\n"}, "content": "  "}
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "tokenizer.json").write_text(json.dumps(serialized))
    with pytest.raises(ValueError, match=r"lost gives \[.*\] for a newline, which must be one id: add the tokens"):
        load_tokenizer(tmp_path / "lost")


def test_a_base_of_32000_tokens_is_not_taken_for_ustm(tmp_path):
    """Its first new ids are those that USTM's tokens have."""
    vocab = {"\n": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 32_000)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")), pad_token="w2"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    save_tokenizer(build_tokenizer(tmp_path / "base", 5), tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").convert_tokens_to_ids("<|correspond|>") == 32_000
