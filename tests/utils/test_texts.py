import pytest

from usdm_sft.utils.texts import count_noun, first_line, format_hours, printable, quote


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (KeyboardInterrupt(" \n"), "KeyboardInterrupt"),
    ],
)
def test_first_line_of_an_error(error, expected):
    assert first_line(error) == expected


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (2048, "2,048 rows"), (-1, "-1 rows")]
)
def test_count_with_its_noun(number, expected):
    assert count_noun(number, "row") == expected


@pytest.mark.parametrize(
    ("hours", "expected"), [(0.0, "0"), (0.00123, "0.0012"), (0.0789, "0.079"), (0.1, "0.10"), (1234.5, "1,234.50")]
)
def test_hours_keep_two_digits(hours, expected):
    assert format_hours(hours) == expected


def test_quoted_value_is_cut_at_the_limit():
    assert quote("a'b") == '"a\'b"'
    assert quote("x" * 80) == repr("x" * 80)
    assert quote("x" * 81) == repr("x" * 80 + "...")


def test_printable_text_has_its_control_characters_escaped():
    assert printable("é\n\x1b[31m\u202e") == "é\n\\x1b[31m\\u202e"
