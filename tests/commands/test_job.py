"""What the flags of a job are read from."""

import pytest

from ddpm_jax.commands.job import parse_loras, read_lines
from ddpm_jax.runtime.errors import UserError


def test_lines_without_the_blank_ones(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffforty-two\r\n\r\n \t\n  seventeen \u0645\u0631\u062d\u0628\u0627\nforty-two".encode())
    assert read_lines("prompts", str(file)) == ["forty-two", "seventeen \u0645\u0631\u062d\u0628\u0627", "forty-two"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "has no lines"),
        (b" \n\n", "has no lines"),
        (b"one\ncaf\xe9\n", "is not UTF-8 text: invalid continuation byte at byte 7"),
    ],
)
def test_refused_files(tmp_path, content, said):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_lines("prompts", str(file))
    assert str(caught.value) == f"--prompts {str(file)!r} {said}"


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_lines("prompts", str(tmp_path))


def test_loras(tmp_path):
    """A weight behind the last colon, unless the whole is a file."""
    odd = tmp_path / "odd:2"
    odd.touch()
    given = ["a.safetensors", "b.safetensors:0.7", "c:d.pt:-1", str(odd), f"{odd}:3"]
    expected = [("a.safetensors", 1.0), ("b.safetensors", 0.7), ("c:d.pt", -1.0), (str(odd), 1.0), (str(odd), 3.0)]
    assert parse_loras(given) == expected


@pytest.mark.parametrize("value", ["a.safetensors:", "a.safetensors:much", ":0.5", "a.safetensors:nan"])
def test_refused_loras(value):
    with pytest.raises(UserError) as caught:
        parse_loras([value])
    assert str(caught.value).startswith(f"--lora is {value!r}; accepted: a file, or a file and its weight such as")
