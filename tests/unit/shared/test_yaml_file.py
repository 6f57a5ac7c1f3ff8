"""YAML values as the flags mean them, and mistakes by file and line."""

import pytest

from shared.errors import ConfigurationError
from shared.yaml_file import line_of, read_yaml, where_given


def test_only_true_and_false_are_switches(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: no\nb: On\nc: yes\nd: off\ne: true\nf: False\ng: trueish\nh: n\n")
    assert read_yaml(path, "a") == {
        "a": "no", "b": "On", "c": "yes", "d": "off", "e": True, "f": False, "g": "trueish",
        "h": "n",
    }  # fmt: skip


def test_numbers_are_decimal_or_text(tmp_path):
    """YAML 1.1 would make 8, 16, 2, 90 and 5415.5 of the last."""
    path = tmp_path / "a.yaml"
    numbers = ["1_000", "0", "-3", "+4", "1.5", "1_000.5", ".5", "1.e3", "-2.5e-4"]
    texts = ["1e-5", "010", "0x10", "0b10", "1:30", "1:30:15.5", "0o10", "08", "1.2.3"]
    path.write_text("".join(f"- {value}\n" for value in [*numbers, *texts]))
    read = read_yaml(path, "a")
    assert read[: len(numbers)] == [float(number) for number in numbers]
    assert [type(value) for value in read[:4]] == [int] * 4
    assert read[len(numbers) :] == texts


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfea: 1")
    with pytest.raises(ConfigurationError, match="file x is not UTF-8 text"):
        read_yaml(path, "file x")
    path.write_text("a: 2024-99-01\n")  # a date of no calendar
    with pytest.raises(ConfigurationError, match=r"x is not valid YAML: month must be in"):
        read_yaml(path, "x")
    path.write_text("a: 1\n- b\n")
    with pytest.raises(ConfigurationError, match=r"x is not valid YAML.*line 2"):
        read_yaml(path, "x")


def test_an_error_is_traced_to_the_line_of_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# flags\nmax_length: 1\nbeta: 2\n")
    argv = ["--config", str(path), "--beta=3"]
    assert line_of(path, "max-length") == 2
    assert where_given("--max_length 1 must be at least 2", argv) == f" ({path}, line 2)"
    assert where_given("--max-length 1 must be at least 2", argv) == f" ({path}, line 2)"
    assert where_given("--beta 3 is given twice", argv) == ""  # by the command line
    assert where_given("--lmbda 3", argv) == ""
    assert where_given(f"--config {path}: --max_length", argv) == ""
    assert where_given("--max_length 1", []) == ""
