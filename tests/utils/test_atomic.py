import pytest

from usdm_sft.utils.atomic import replace_text, write_then_replace


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_has_its_final_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "list.txt"
    with write_then_replace(path) as file:
        file.write("ß")
        assert names(path.parent) == ["list.txt.unfinished"]
    assert names(path.parent) == ["list.txt"]
    assert path.read_bytes() == "ß".encode()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "list.txt"
    path.write_text("old")
    with pytest.raises(error), write_then_replace(path) as file:
        file.write("new")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["list.txt"]


def test_file_that_a_killed_run_left_is_overwritten(tmp_path):
    (tmp_path / "list.txt.unfinished").write_text("a longer text than the new one")
    replace_text(tmp_path / "list.txt", "new")
    assert names(tmp_path) == ["list.txt"]
    assert (tmp_path / "list.txt").read_text() == "new"


def test_bytes_and_options_of_open(tmp_path):
    with write_then_replace(tmp_path / "sound", "wb") as file:
        file.write(b"\xff\n")
    with write_then_replace(tmp_path / "text", encoding="latin-1", newline="\r\n") as file:
        file.write("é\n")
    assert (tmp_path / "sound").read_bytes() == b"\xff\n"
    assert (tmp_path / "text").read_bytes() == b"\xe9\r\n"


def test_replace_text_keeps_line_ends(tmp_path):
    replace_text(tmp_path / "text", "é\r\nb\n")
    assert (tmp_path / "text").read_bytes() == "é\r\nb\n".encode()
