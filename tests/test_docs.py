"""What a user can set or read is in the docs: the code and the pages cannot drift apart."""

import re
from pathlib import Path

import msgspec
import pytest

from fairlead.cli.serve import serve
from fairlead.core.settings import Settings
from fairlead.core.specs import BatchingSpec, InstancesSpec, ModelSpec, QueuePolicy, TensorSpec
from fairlead.observe import metrics
from fairlead.runtime.batcher import CloseReason

DOCS = Path(__file__).parent.parent / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text()


def fields(type_: type, prefix: str = "") -> list[str]:
    return [prefix + field.name for field in msgspec.structs.fields(type_)]


@pytest.mark.parametrize(
    "key",
    [
        *fields(ModelSpec),
        *fields(BatchingSpec, "batching."),
        *fields(InstancesSpec, "instances."),
        *fields(QueuePolicy),
        *fields(TensorSpec),
    ],
)
def test_every_key_of_model_yaml_is_documented(key):
    assert re.search(rf"`(batching\.|instances\.)?{re.escape(key.split('.')[-1])}[`.:]", page("models.md"))


def test_every_setting_and_flag_is_documented():
    text = page("configuration.md")
    settings = [f"{section.name}.{name}" for section in msgspec.structs.fields(Settings) for name in fields(section.type)]
    assert [key for key in settings if f"`{key}`" not in text] == []
    flags = [option.opts[0] for option in serve.params if option.opts[0].startswith("--") and option.name != "config"]
    assert [flag for flag in flags if f"`{flag}`" not in text] == []


def test_every_metric_and_close_reason_is_documented():
    text = page("operations.md")
    rows = re.findall(r"^\| (fairlead_\w+) \|", metrics.__doc__ or "", flags=re.MULTILINE)
    names = {family.name for family in metrics.Metrics().collect()}
    assert {name.removesuffix("_total") for name in rows} == names
    assert [name for name in rows if f"`{name}`" not in text] == []
    assert [reason for reason in CloseReason if f"`{reason}`" not in text] == []
    assert [reason for reason in CloseReason if reason not in (metrics.__doc__ or "") + page("operations.md")] == []
