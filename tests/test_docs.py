"""What a user can set or read is in the docs: the code and the pages cannot drift apart."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.inspect import DictType, Field, ListType, StructType, UnionType, VarTupleType, type_info
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from fairlead.api.admin import Admin
from fairlead.api.anthropic.bodies import MessagesBody
from fairlead.api.anthropic.errors import KINDS
from fairlead.api.jobs.administration import JobAdministration
from fairlead.api.jobs.canonical import Canonical
from fairlead.api.jobs.face import Shared
from fairlead.api.observe.incidents import IncidentOperations
from fairlead.api.observe.logs import LogOperations
from fairlead.api.observe.profile import ProfileOperations
from fairlead.api.observe.replicas import ReplicaOperations
from fairlead.api.observe.requests import RequestRoutes
from fairlead.api.observe.slo import SloOperations
from fairlead.api.openai.bodies import ChatBody, CompletionBody
from fairlead.api.openai.errors import OpenAIErrors, openai_status
from fairlead.api.openai.ranking import RerankBody, ScoreBody
from fairlead.api.openapi import document
from fairlead.api.registry import RegistryRoutes
from fairlead.api.rollouts import RolloutOperations
from fairlead.api.sleep import SleepOperations
from fairlead.api.status import grpc_status, http_status
from fairlead.cli import COMMANDS
from fairlead.cli.serve import serve
from fairlead.control.checks import Rules
from fairlead.control.registry import Registry
from fairlead.control.rollouts import Rollouts
from fairlead.core.errors import FairleadError, LimitExceeded, Unavailable
from fairlead.core.rollout import ControlSettings, RegistrySettings
from fairlead.core.settings import Settings, parse_settings
from fairlead.core.slo import AlertSettings, IncidentSettings
from fairlead.core.specs import (
    BatchingSpec,
    DiffusionSpec,
    EngineSpec,
    InstancesSpec,
    LlmSpec,
    ModelSpec,
    QueuePolicy,
    SpeculationSpec,
    TensorSpec,
)
from fairlead.gateway.configuration import FIXED
from fairlead.gateway.course import compiled
from fairlead.gateway.ends import REASONS, ended
from fairlead.gateway.routing.fallbacks import check_fallbacks
from fairlead.observe.counts import Counts
from fairlead.observe.finished import Finished
from fairlead.observe.incidents.incidents import Incidents
from fairlead.observe.logs import Journal
from fairlead.observe.metrics import Metrics
from fairlead.observe.recent import Recent
from fairlead.observe.slo.slos import Slos
from fairlead.observe.table import GROUPS, TABLE
from fairlead.runtime.batcher import CloseReason
from fairlead.runtime.profiler import Profiler
from fairlead.runtime.repository import ModelRepository, RepositorySettings
from fairlead.store.store import Store

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SOURCES = sorted((ROOT / "src" / "fairlead").rglob("*.py"))


def page(name: str) -> str:
    return (DOCS / name).read_text()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def calls() -> list[tuple[str, ast.Call]]:
    """(what is called, the call) of all the code."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                found.append((name, node))
    return found


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


@pytest.mark.parametrize(
    ("section", "type_", "name"),
    [
        ("llm", LlmSpec, "language-models.md"),
        ("diffusion", DiffusionSpec, "image-models.md"),
        ("engine", EngineSpec, "engines.md"),
        ("llm.speculation", SpeculationSpec, "speculation.md"),
    ],
)
def test_every_key_of_an_engines_section_is_documented_with_its_default(section, type_, name):
    text = page(name)
    for field in msgspec.structs.fields(type_):
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        if default in ((), msgspec.NODEFAULT):
            assert f"| `{section}.{field.name}` | none |" in text, field.name
            continue
        if isinstance(default, msgspec.Struct):  # a section of its own
            default = ""
        shown = (
            f"{default:g}"
            if isinstance(default, float)
            else f"`{default}`"
            if isinstance(default, str) and default not in ("true", "false")
            else "null"
            if default is None
            else default
        )
        row = f"| `{section}.{field.name}` | {shown if default != '' else ''} |".replace("|  |", "| |")
        assert row in text, row


def test_every_parameter_of_the_openai_api_that_is_not_openais_is_documented():
    text = page("language-models.md")
    openais = {"model", "messages", "prompt", "stream", "stream_options", "tools", "tool_choice", "response_format", "modalities", "store"}
    bodies = {field.name for body in (ChatBody, CompletionBody) for field in msgspec.structs.fields(body)}
    ours = bodies - openais - set(CompletionParams.__annotations__) - set(ChatParams.__annotations__)
    assert ours and [name for name in ours if f"`{name}`" not in text] == []


def test_every_field_and_error_of_the_messages_api_is_documented():
    text = page("messages.md")
    fields = {field.name for field in msgspec.structs.fields(MessagesBody)} - {"model", "stream", "thread"}
    assert [name for name in fields if not re.search(rf"`{name}[`.]", text)] == []
    of_any_door = (408, 431)
    assert [row for row in KINDS.values() if row[0] not in of_any_door and f"| {row[0]} | `{row[1]}` |" not in text] == []


def test_every_field_of_rerank_and_score_is_documented():
    text = page("rerank.md")
    fields = {field.name for body in (RerankBody, ScoreBody) for field in msgspec.structs.fields(body)}
    assert [name for name in fields if f"`{name}`" not in text] == ["model"]


def settings_of(type_: Any, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """(key, field) of every setting, in lists as `auth.oidc[].issuer`, in mappings as `gateway.models.NAME.price`."""
    for field in type_info(type_).fields if isinstance(type_, type) else type_.fields:
        key, kind, below = prefix + field.encode_name, field.type, "."
        if isinstance(kind, StructType):
            yield from settings_of(kind, key + ".")
            continue
        yield key, field
        if isinstance(kind, UnionType):
            kind = kind.types[0]
        if isinstance(kind, (VarTupleType, ListType)):
            kind, below = kind.item_type, "[]."
        elif isinstance(kind, DictType):
            kind, below = kind.value_type, ".NAME."
        if isinstance(kind, StructType):
            yield from settings_of(kind, key + below)


def shown(field: Field) -> str:
    """A default, as the pages write it."""
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    match value:
        case bool():
            return str(value).lower()
        case None:
            return "null"
        case dict():
            return ", ".join(f"{name}: {each}" if isinstance(each, int) else name for name, each in value.items())
        case (msgspec.Struct(), *_):
            return f"{len(value)} {field.name}"
        case tuple() | list():
            return ", ".join(each if isinstance(each, str) else f"{each:g}" for each in value)
        case int() if value >= 1 << 20:
            return f"{value >> 20} MiB"
        case int():
            return str(value)
        case float():
            return f"{value:g}"
    return str(value)


def documented_settings(text: str) -> dict[str, str]:
    """Key → default, of all tables with these columns; those under a heading "Each of `KEY`" leave that out."""
    found: dict[str, str] = {}
    prefixes, column = [""], 0
    for line in text.splitlines():
        if line.startswith("#"):
            prefixes = [f"{key}." for key in re.findall(r"`(.+?)`", line)] if re.match(r"#+ (Each of|Of) ", line) else [""]
        elif not line.startswith("|"):
            column = 0
        elif line.startswith("| key |"):
            column = [cell.strip() for cell in line.split("|")].index("default")
        elif column and (match := re.match(r"\| `(.+?)` \|", line)):
            found |= {prefix + match[1]: line.split("|")[column].strip() for prefix in prefixes}
    return found


def test_every_setting_is_documented_with_its_default():
    expected = {key: shown(field) for key, field in settings_of(Settings)}
    assert documented_settings(page("configuration.md")) | documented_settings(page("rollouts.md")) == expected


def test_every_rule_of_checks_is_documented_with_its_default():
    expected = {}
    for field in type_info(Rules).fields:  # type: ignore[attr-defined]
        kind = next((each for each in getattr(field.type, "types", (field.type,)) if isinstance(each, StructType)), None)
        prefix = "" if kind is None else f"{field.name}."
        for each in (field,) if kind is None else kind.fields:
            expected[prefix + each.name] = shown(each)
    expected["safety.refusals"] = "English"
    expected["memory.growth_bytes"] = "1048576"
    assert documented_settings(page("validation.md").partition("### checks.yaml")[2]) == expected


def test_what_changes_with_a_restart_only_is_said():
    rows = page("configuration.md").splitlines()
    for name in FIXED:
        assert any(row.startswith(f"| `gateway.{name}") and "with a restart only" in row for row in rows), name


def test_every_flag_is_documented():
    text = page("configuration.md")
    flags = [option.opts[0] for option in serve.params if option.opts[0].startswith("--") and option.name != "config"]
    assert [flag for flag in flags if f"`{flag}`" not in text] == []


def test_every_metric_is_documented_and_nothing_else():
    expected = []
    for group, title in GROUPS.items():
        expected.append(f"### {title}")
        for metric in TABLE.values():
            if metric.group == group:
                labels = ", ".join(f"`{label}`" for label in metric.labels)
                row = f"| `{metric.name}` | {metric.kind} | {metric.unit} | {labels} | {metric.bound} | {metric.help} |"
                expected.append(row.replace("|  |", "| |"))
    section = page("metrics.md").partition("## The table")[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith(("### ", "| `"))] == expected


def test_every_metric_is_filled_by_the_code_and_what_is_filled_is_in_the_table():
    """By their names, which stand in the code as they are."""
    used = set()
    for path in SOURCES:
        if path.parent.name != "dashboards" and path.name != "table.py":
            tree = ast.parse(path.read_text())
            texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
            used |= {text for text in texts if re.fullmatch(r"(fairlead|process|nv_inference|python)_[a-z_]+|vllm:[a-z0-9_]+", text)}
    assert TABLE.keys() <= used
    assert {
        name for name in used if name.startswith("fairlead_") and name.endswith(("_total", "_seconds", "_bytes", "_ratio"))
    } <= TABLE.keys()


def test_every_close_reason_is_documented():
    assert [reason for reason in CloseReason if f"`{reason}`" not in page("metrics.md")] == []


def test_what_is_counted_has_a_row_and_its_labels_and_every_row_is_counted():
    constants = {
        target.id: node.value.value
        for path in SOURCES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    counted = {}
    for name, call in calls():
        if name == "add" and call.args and ast.unparse(call.func).endswith("counts.add"):
            what = call.args[0]
            metric = what.value if isinstance(what, ast.Constant) else constants.get(getattr(what, "id", ""))
            if isinstance(metric, str) and metric.startswith("fairlead_"):
                counted[metric] = len(call.args) - 1
    assert counted == {name: len(metric.labels) for name, metric in TABLE.items() if metric.counted}


def kinds_of(kind: type[FairleadError]) -> Iterator[type[FairleadError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from kinds_of(each)


def refusals() -> set[tuple[type[FairleadError], str]]:
    """(kind of error, reason) of all refusals that the code knows."""
    unavailable = {kind.__name__: kind for kind in kinds_of(Unavailable)}
    found = set(REASONS.items()) | {(kind, kind.reason) for kind in unavailable.values() if "reason" in vars(kind)}
    for name, call in calls():
        for keyword in call.keywords:
            if name in unavailable and keyword.arg == "reason" and isinstance(keyword.value, ast.Constant):
                found.add((unavailable[name], keyword.value.value))
    return found | {(LimitExceeded, "limit-UNIT"), (LimitExceeded, "budget-UNIT"), (LimitExceeded, "limit-concurrent")}


def test_every_reason_of_a_refusal_is_documented_with_what_each_protocol_makes_of_it():
    text = page("gateway.md")
    missing = []
    for kind, reason in refusals():
        error = kind.__new__(kind)
        error.message = "no"
        if isinstance(error, Unavailable):
            error.reason = reason
        assert ended(error) == ("refused", reason)
        told = msgspec.json.decode(OpenAIErrors().event(error))["error"]
        code = f" `{told['code']}`" if told["code"] else ""
        row = f"| `{reason}` | {http_status(error)} | {openai_status(error)} `{told['type']}`{code} | {grpc_status(error).name} |"
        if row not in text:
            missing.append(row)
    assert sorted(missing) == []


def test_every_header_of_ours_is_documented():
    text = page("gateway.md").lower()
    names = {
        name.lower()
        for path in SOURCES
        for name in re.findall(r"\bx-(?:fairlead|ratelimit|should)-[\w-]*\w\b", path.read_text(), flags=re.IGNORECASE)
        if not path.name.endswith("fake.py")
    }
    assert {"x-fairlead-reason", "x-fairlead-class"} <= names
    assert sorted(name for name in names if f"`{name}`" not in text) == []


def test_every_kind_of_refused_credentials_is_documented():
    text = page("access.md")
    kinds = {call.args[0].value for name, call in calls() if name == "Refused" and isinstance(call.args[0], ast.Constant)}
    assert {"missing", "unknown", "token-expired"} <= kinds
    assert sorted(kind for kind in {*kinds, "revoked", "tenant"} if f"`{kind}`" not in text) == []


@pytest.fixture
def operations(tmp_path):
    store = Store.open(f"sqlite:///{tmp_path}/fairlead.db")
    registry, settings = Registry(store, RegistrySettings()), ControlSettings()
    rollouts = RolloutOperations(Rollouts(store, registry, settings))
    requests = RequestRoutes(Recent(), Finished())
    replicas = ReplicaOperations(tuple, {}.get, tuple, lambda: None)
    logs, profiles = (
        LogOperations(Journal, lambda _: None),
        ProfileOperations(Profiler(ModelRepository(RepositorySettings(sources=()), Metrics()), Finished())),
    )
    slos = SloOperations(Slos((), AlertSettings(), Counts(), server="", signals=lambda: None))
    incidents = IncidentOperations(Incidents(IncidentSettings(), tmp_path.absolute, lambda: None, server=""))
    nothing: Any = None
    jobs = JobAdministration(Canonical(Shared(*[nothing] * 6, max_body_bytes=1)), nothing)
    sleep = SleepOperations(ModelRepository(RepositorySettings(sources=()), Metrics()), lambda _: None)
    rooms = (Admin(store), RegistryRoutes(registry), rollouts, jobs, sleep, requests, replicas, logs, profiles, slos, incidents)
    yield [operation for room in rooms for operation in room.operations]
    store.close()


def test_every_operation_of_the_administration_is_documented_and_described_in_openapi(operations):
    text = "".join(path.read_text() for path in PAGES)
    assert [each.address for each in operations if f"{each.address}`" not in text and f"{each.address}?" not in text] == []
    described = document(operations, {})
    assert {method.upper() + " " + path for path, methods in described["paths"].items() for method in methods} == {
        f"{each.method} {each.address}" for each in operations
    }
    assert [tag["name"] for tag in described["tags"]] == ["admin"]


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"fairlead {name}" not in text] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_examples_of_a_page_can_be_read(path, monkeypatch):
    for text in blocks(path, "yaml"):
        for name in re.findall(r"\$\{(\w+)\}", text):
            monkeypatch.setenv(name, "something")
        first = re.search(r"^(\w+):", text, flags=re.MULTILINE)
        if first is not None and first[1] in Settings.__struct_fields__:
            policies = parse_settings(text, path.name).gateway
            check_fallbacks(policies)
            compiled(policies)
    for text in blocks(path, "python"):
        compile(text, path.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_links_of_a_page_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target
