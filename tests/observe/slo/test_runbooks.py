"""Every alert has its runbook, every runbook its alert; and what a runbook tells people to type works."""

import re
import shlex
from pathlib import Path

import click
import pytest

from fairlead.cli import cli
from fairlead.core.settings import Settings
from fairlead.core.specs import LlmSpec
from fairlead.observe.slo.alerts import BURN, RULES
from fairlead.observe.table import TABLE
from tests.test_docs import settings_of

FOLDER = Path(__file__).parents[3] / "docs/runbooks"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
SEVERITIES = {BURN: "page, or ticket"} | {rule.name: rule.severity for rule in RULES}


def test_every_alert_has_its_runbook_and_every_runbook_its_alert():
    assert {path.stem for path in PAGES} == SEVERITIES.keys()


def test_the_list_of_runbooks_names_all_of_them():
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| ([\w, ]+) \|", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert {(name, link, severity) for name, link, severity in rows} == {(name, name, severity) for name, severity in SEVERITIES.items()}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_runbook_says_what_it_means_how_to_see_it_and_what_to_do(path):
    text = path.read_text()
    assert text.startswith(f"# {path.stem}\nSeverity: {SEVERITIES[path.stem]}.\n\n")
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == ["How to see it", "What to do"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_metrics_and_settings_of_a_runbook_are_there(path):
    text = path.read_text()
    commands = re.findall(r"^(fairlead .*)$", text, flags=re.MULTILINE) + re.findall(r"`(fairlead [^`]+)`", text)
    for command in commands:
        check(shlex.split(command, comments=True)[1:])
    metrics = set(re.findall(r"\b(fairlead_\w+|process_\w+)", text))
    assert metrics <= TABLE.keys(), metrics - TABLE.keys()
    keys = {key for key, _ in settings_of(Settings)} | {f"llm.{name}" for name in LlmSpec.__struct_fields__}
    sections = {key.partition(".")[0] for key in keys}
    named = [
        name for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", text) if name.partition(".")[0] in sections and not name.endswith(".yaml")
    ]
    assert [name for name in named if name not in keys and not any(key.startswith(f"{name}") for key in keys)] == []


def check(words):
    """Raises AssertionError for a command or an option that there is not."""
    command = cli
    while isinstance(command, click.Group) and words and (found := command.get_command(click.Context(command), words[0])) is not None:
        command, words = found, words[1:]
    assert not isinstance(command, click.Group) or not words or words[0].startswith("-"), words
    options = {each for parameter in command.params for each in parameter.opts}
    assert [word for word in words if word.startswith("--") and word not in options] == [], command.name
    required = [parameter.name for parameter in command.params if isinstance(parameter, click.Argument) and parameter.required]
    assert len(required) <= len([word for word in words if not word.startswith("-")]), command.name
