"""Files of a model's folder that hold a JSON object: what is wrong with them is said by name."""

from pathlib import Path

import pytest

from fairlead.core.errors import LoadError
from fairlead.core.json_files import read_json


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"a": [1, "é"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1]", "must hold a JSON object, not list"),
        (b"null", "must hold a JSON object, not NoneType"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
    ],
)
def test_what_is_no_object_is_refused_by_the_name_of_the_file(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(LoadError, match=f"{tmp_path.name}/config.json {said}"):
        read_json(tmp_path / "config.json")


def test_a_file_that_is_missing_may_mean_something(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"has no config\.json$"):
        read_json(tmp_path / "config.json")
    with pytest.raises(LoadError, match=r"has no config\.json: it is no checkpoint$"):
        read_json(tmp_path / "config.json", otherwise="it is no checkpoint")
    with pytest.raises(LoadError, match="cannot be read: Is a directory"):
        read_json(tmp_path)
