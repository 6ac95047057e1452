"""What an operator writes is typed; what is wrong with it is said with file and line."""

from pathlib import Path
from typing import Any

import pytest

from fairlead.core.config import read_yaml
from fairlead.core.errors import ConfigError
from fairlead.core.policy import AuthSettings
from fairlead.core.settings import Listen, Settings, asks_for_keys, read_settings
from fairlead.core.specs import ModelSpec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: red", "m.yaml:1: unknown key `colour`"),
        ("inputs:\n- name: x\n  datatype: FP31\n  shape: [1]", "m.yaml:3: Invalid enum value 'FP31' (at inputs[0].datatype)"),
        ("inputs:\n- name: x\n  datatype: FP32\n", "m.yaml:2: Object missing required field `shape` (at inputs[0])"),
        ("batching:\n\n  max_batch_size: no\n", "m.yaml:3: Expected `int`, got `str` (at batching.max_batch_size)"),
        (
            "batching: {queue_policy: {timeout_action: WAIT}}",
            "m.yaml:1: Invalid enum value 'WAIT' (at batching.queue_policy.timeout_action)",
        ),
        ("inputs: [", "m.yaml:1: not YAML: did not find expected node content"),
        ("- a list", "m.yaml:1: Expected `object`, got `array`"),
        (
            "batching:\n  max_batch_size: 4\n  preferred_batch_sizes: [8]",
            "m.yaml:2: `preferred_batch_sizes` must be at most `max_batch_size`, 4 (at batching)",
        ),
        (
            "batching: {default_priority: 2}",
            "m.yaml:1: `default_priority` must be one of the `priority_levels`, of which there are 0 (at batching)",
        ),
        (
            "batching: {priority_levels: 2, priority_queue_policies: {3: {}}}",
            "m.yaml:1: `priority_queue_policies` must be of the `priority_levels`, of which there are 2 (at batching)",
        ),
        (
            "version_policy: {latest: 2, all: true}",
            "m.yaml:1: only one of `latest`, `all` and `specific` can be wanted (at version_policy)",
        ),
        (
            "warmup: [{inputs: {x: {data: [1], fill: random}}}]",
            "m.yaml:1: `data` and `fill` cannot both be given (at warmup[0].inputs.x)",
        ),
        ("instances: {count: 0}", "m.yaml:1: Expected `int` >= 1 (at instances.count)"),
        (
            "warmup:\n- inputs:\n    a: {fill: zeros}\n    b:\n      fill: ones\n    c: {fill: random}",
            "m.yaml:5: Invalid enum value 'ones' (at warmup[0].inputs.b.fill)",
        ),
        (
            "warmup:\n- inputs:\n    a: {fill: zeros}\n    b: {\n      fil: zeros}",
            "m.yaml:5: unknown key `fil` (at warmup[0].inputs.b)",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(text, message):
    with pytest.raises(ConfigError) as error:
        read_yaml(text, ModelSpec, "m.yaml")
    assert error.value.message == message


def test_off_is_a_word_and_only_true_and_false_are_truths():
    values = read_yaml("a: off\nb: no\nc: true\nd: False\ne: 'on'\nf: null\n", dict[str, Any], "settings.yaml")

    assert values == {"a": "off", "b": "no", "c": True, "d": False, "e": "on", "f": None}


def test_an_empty_file_is_all_defaults():
    assert read_yaml("", ModelSpec, "m.yaml") == ModelSpec()


def write(folder: Path, text: str) -> Path:
    path = folder / "fairlead.yaml"
    path.write_text(text)
    return path


def test_environment_variables_fill_in(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELS", "/srv/models")
    assert read_settings(write(tmp_path, "models: {repositories: ['${MODELS}']}")).models.repositories == ("/srv/models",)


def test_an_environment_variable_that_is_not_set_is_an_error_with_its_line(tmp_path):
    with pytest.raises(ConfigError, match=r"fairlead\.yaml:2: environment variable NOT_THERE is not set"):
        read_settings(write(tmp_path, "models:\n  repositories: ['${NOT_THERE}']\n"))


def test_an_absent_settings_file_is_one_readable_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*: No such file"):
        read_settings(tmp_path / "fairlead.yaml")


def test_keys_are_asked_for_beyond_loopback_and_only_there_unless_told_otherwise():
    assert not asks_for_keys(Settings())
    assert asks_for_keys(Settings(listen=Listen(host="0.0.0.0")))
    assert asks_for_keys(Settings(listen=Listen(ops_host="::")))
    assert not asks_for_keys(Settings(listen=Listen(host="0.0.0.0", open=True)))
    assert asks_for_keys(Settings(auth=AuthSettings(required=True)))


def test_nobody_serves_strangers_by_accident():
    with pytest.raises(ConfigError, match=r"reachable from other machines and `auth\.required` is false: pass --open"):
        asks_for_keys(Settings(listen=Listen(host="0.0.0.0"), auth=AuthSettings(required=False)))
    with pytest.raises(ConfigError, match="contradict"):
        asks_for_keys(Settings(listen=Listen(open=True), auth=AuthSettings(required=True)))


@pytest.mark.parametrize("text", ["a: " + "[" * 40_000, "- " * 20_000 + "x", "{a: " * 40_000])
def test_a_file_that_is_nested_too_deeply_is_refused_and_not_the_end_of_the_process(text):
    with pytest.raises(ConfigError, match="nested more than 64 deep"):
        read_yaml(text, Settings, "fairlead.yaml")


def test_a_key_that_stands_twice_is_an_error_with_its_line():
    text = "gateway:\n  models:\n    up: {limits: {concurrent: 1}}\n    other: {}\n    up: {}\n"
    with pytest.raises(ConfigError, match=r"fairlead.yaml:5: key `up` stands twice"):
        read_yaml(text, Settings, "fairlead.yaml")
