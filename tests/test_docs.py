"""What a user can set or read is in the docs: the code and the pages cannot drift apart."""

import re
from pathlib import Path

import msgspec
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from fairlead.api.openai.bodies import ChatBody, CompletionBody
from fairlead.cli.serve import serve
from fairlead.core.settings import Settings
from fairlead.core.specs import BatchingSpec, InstancesSpec, LlmSpec, ModelSpec, QueuePolicy, TensorSpec
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


def test_every_key_of_the_llm_section_is_documented_with_its_default():
    text = page("language-models.md")
    for field in msgspec.structs.fields(LlmSpec):
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        shown = (
            f"{default:g}"
            if isinstance(default, float)
            else f"`{default}`"
            if isinstance(default, str) and default not in ("true", "false")
            else default
        )
        row = f"| `llm.{field.name}` | {shown if default != '' else ''} |".replace("|  |", "| |")
        assert row in text, row


def test_every_parameter_of_the_openai_api_that_is_not_openais_is_documented():
    text = page("language-models.md")
    openais = {"model", "messages", "prompt", "stream", "stream_options", "tools", "tool_choice", "response_format", "modalities", "store"}
    bodies = {field.name for body in (ChatBody, CompletionBody) for field in msgspec.structs.fields(body)}
    ours = bodies - openais - set(CompletionParams.__annotations__) - set(ChatParams.__annotations__)
    assert ours and [name for name in ours if f"`{name}`" not in text] == []


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
