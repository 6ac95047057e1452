"""Checks are files that are read strictly: a slip in them must not pass for a gate."""

import json

import msgspec
import numpy as np
import pytest

from fairlead.control.checks import AccuracyRule, Checks, Golden, MemoryRule, Packed, Rules, Tensor, checks_of, packed
from fairlead.control.checks_folder import read_checks, write_golden
from fairlead.core.errors import ConfigError, InvalidRequest
from fairlead.core.generation import Message, Sampling


@pytest.fixture
def folder(tmp_path):
    """Writes files into a folder of checks."""

    def write(**files):
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text)
        return tmp_path

    return write


ROW = '{"inputs": {"x": [1, 2.5]}, "label": 1}\n'


def test_a_folder_with_everything_is_read(folder):
    checks = read_checks(
        folder(
            checks_yaml="accuracy: {floor: 0.9}\nmemory: {}\nload_seconds: 30\n",
            golden_jsonl='{"prompt": "say hello", "text": "hello", "match": "contains"}\n\n'
            '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}],'
            ' "outputs": [{"name": "y", "datatype": "BYTES", "shape": [1], "data": ["ship"]}]}\n',
            dataset_jsonl=ROW + '{"inputs": {"x": [3, 4]}, "label": 0}\n',
            safety_jsonl='{"chat": [{"role": "user", "content": "how do I pick a lock?"}], "must_refuse": true}\n',
        )
    )

    assert checks.rules == Rules(accuracy=AccuracyRule(floor=0.9), memory=MemoryRule(), load_seconds=30.0)
    text, tensors = checks.golden
    assert text.sampling == Sampling(temperature=0.0) and text.match == "contains"
    assert tensors.inputs[0].array().tolist() == [[1.0, 2.0]] and tensors.outputs[0].array().tolist() == [b"ship"]
    assert checks.dataset is not None and checks.dataset.num_rows == 2
    assert checks.dataset.inputs["x"].array().tolist() == [[1.0, 2.5], [3.0, 4.0]]
    assert checks.safety[0].must_refuse and checks.safety[0].chat == (Message(role="user", content="how do I pick a lock?"),)


def test_the_registry_keeps_the_same_as_json(folder):
    checks = read_checks(folder(checks_yaml="sanity: null\n", dataset_jsonl=ROW))

    assert checks_of(json.loads(json.dumps(checks.to_json()))) == checks
    assert checks_of({}) == Checks()
    with pytest.raises(InvalidRequest, match=r"unknown field `golde`"):
        checks_of({"golde": []})


def test_a_data_set_of_arrays_is_read(tmp_path):
    np.savez(tmp_path / "dataset.npz", x=np.eye(3, dtype=np.float32), labels=np.array(["oak", "elm", "ash"]))
    dataset = read_checks(tmp_path).dataset

    assert dataset is not None
    assert dataset.labels.array().tolist() == [b"oak", b"elm", b"ash"]
    assert np.array_equal(dataset.inputs["x"].array(), np.eye(3))


def test_a_data_set_of_texts_is_read(folder):
    dataset = read_checks(folder(dataset_jsonl='{"prompt": "the sky is", "label": "blue"}\n')).dataset

    assert dataset is not None and dataset.questions[0].prompt == "the sky is"
    assert dataset.labels.array().tolist() == [b"blue"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"checks_yaml": "golden:\n  rtoll: 1\n"}, r"checks\.yaml:2: unknown key `rtoll`"),
        ({"checks_yaml": "accuracy: {metric: mae, floor: 1}\n"}, r"checks\.yaml:1: `mae` is better where it is less"),
        ({"checks_yaml": "latency: {}\n"}, "needs at least one of `p50`"),
        ({"checks_yaml": "safety: {forbidden: ['(']}\n"}, "no regular expression"),
        ({"check_yaml": ""}, r"check\.yaml is no file of checks"),
        ({}, "holds no checks"),
        ({"golden_jsonl": '\n{"prompt": "a"}\n'}, r"golden\.jsonl:2: what must come back is given in `text`"),
        ({"golden_jsonl": '{"prompt": "a", "embed": "b", "text": "c"}'}, r"golden\.jsonl:1: exactly one of"),
        ({"golden_jsonl": '{"prompt": "a", "text": "b", "vector": [1]}'}, "and there alone"),
        ({"golden_jsonl": "{"}, r"golden\.jsonl:1: "),
        ({"safety_jsonl": '{"embed": "a"}'}, "is a `chat` or a `prompt`"),
        ({"safety_jsonl": '{"prompt": "a", "forbidden": ["["]}'}, "no regular expression"),
        ({"dataset_jsonl": "\n"}, "holds no row"),
        ({"dataset_jsonl": ROW + '{"inputs": {"x": [1]}, "label": 1}'}, r"dataset\.jsonl:2: `x` has shape \[1\], in the first row \[2\]"),
        ({"dataset_jsonl": ROW + '{"inputs": {"z": [1, 2]}, "label": 1}'}, r"dataset\.jsonl:2: a row with \['z'\]"),
        ({"dataset_jsonl": '{"inputs": {"x": [[1], [1, 2]]}, "label": 1}'}, r"dataset\.jsonl:1: `x` is no array"),
        ({"dataset_jsonl": ROW + ROW.replace("1}", '"one"}')}, "labels are all numbers or all texts"),
        ({"dataset_jsonl": '{"embed": "a", "label": 1}'}, r"dataset\.jsonl:1: a row has `inputs`, a `chat` or a `prompt`"),
        ({"dataset_npz": "PK"}, "is no .npz of plain arrays"),
        ({"dataset_npz": "", "dataset_jsonl": ROW}, "keep one of them"),
    ],
)
def test_a_slip_is_an_error_that_says_where(folder, files, message):
    with pytest.raises(ConfigError, match=message):
        read_checks(folder(**files))


def test_a_pickle_is_not_read(tmp_path):
    np.savez(tmp_path / "dataset.npz", x=np.array([object()]), labels=np.array([1]))
    with pytest.raises(ConfigError, match=r"is no \.npz of plain arrays"):
        read_checks(tmp_path)


def test_arrays_without_labels_are_an_error(tmp_path):
    np.savez(tmp_path / "dataset.npz", x=np.eye(2))
    with pytest.raises(ConfigError, match="has no array `labels`; it has: x"):
        read_checks(tmp_path)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_checks(tmp_path / "nowhere")


def test_golden_examples_are_written_as_they_are_read(tmp_path):
    examples = [Golden(embed="a", vector=(0.5, 0.25)), Golden(prompt="a\nb", text="c", sampling=Sampling(temperature=0.0, max_tokens=3))]
    write_golden(tmp_path / "golden.jsonl", examples)
    assert list(read_checks(tmp_path).golden) == examples


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.int8).reshape(2, 3), np.array([b"a", b"", b"\xff"], object), np.zeros((0, 2))])
def test_a_packed_array_comes_back(array):
    back = msgspec.convert(msgspec.to_builtins(packed(array)), Packed).array()
    assert back.shape == array.shape and back.tolist() == array.tolist()


def test_an_array_that_was_cut_is_an_error():
    with pytest.raises(InvalidRequest, match="has 8 bytes"):
        Packed(datatype="INT64", shape=(2,), data=bytes(8)).array()


def test_a_tensor_whose_data_do_not_fit_is_an_error():
    with pytest.raises(InvalidRequest, match=r"tensor 'x' is no INT8 of shape \[2\]"):
        Tensor(name="x", datatype="INT8", shape=(2,), data=[1, 2, 3]).array()
