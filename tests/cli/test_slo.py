"""`fairlead slo` and `fairlead incident`, of a real server in a process of its own; and rules, for which there is none."""

import json
import stat
import tarfile

import pytest
import yaml
from click.testing import CliRunner

from fairlead.cli import cli
from fairlead.core.errors import FairleadError
from fairlead.core.settings import parse_settings
from fairlead.observe.slo.suggest import suggested
from tests.servers import IDENTITY, serving, write_model

CONFIG = """
slos: [{name: available, target: 0.99, min_events: 10}]
incidents: {folder: FOLDER, sample_seconds: 1}
"""


def run(*arguments):
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def said(*arguments):
    return json.loads(run(*arguments, "--json"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slo")
    (folder / "fairlead.yaml").write_text(CONFIG.replace("FOLDER", str(folder / "incidents")))
    write_model(folder / "models", "identity", IDENTITY)
    with serving(folder / "models", "--config", folder / "fairlead.yaml") as running:
        running.begin()
        for _ in range(250):
            assert running.infer("identity", [1, 2, 3, 4])[0] == 200
        yield running


def test_objectives_are_listed_and_shown(server):
    place = ("--url", server.ops)
    [shown] = said("slo", "list", *place)["objectives"]
    assert (shown["name"], shown["enough"]) == ("available", True)
    assert said("slo", "show", "available", *place)["name"] == "available"
    assert "availability of all models" in run("slo", "list", *place)
    assert "budget left" in run("slo", "show", "available", *place)
    assert said("slo", "alerts", *place)["alerts"] == []
    with pytest.raises(FairleadError, match="there is no objective 'none'"):
        run("slo", "show", "none", *place)


def test_what_a_server_attains_makes_objectives_to_begin_with(server):
    text = run("slo", "suggest", "--url", server.ops)
    settings = parse_settings(text, "suggested")
    assert [(each.name, each.model, each.kind) for each in settings.slos] == [
        ("identity-available", "identity", "availability"),
        ("identity-latency", "identity", "latency"),
    ]
    assert said("slo", "suggest", "--url", server.ops)["slos"][0]["target"] == 0.99


def test_an_incident_is_begun_ended_and_fetched(server, tmp_path):
    place = ("--url", server.ops)
    begun = said("incident", "start", "--title", "It [red]is[/red] slow", *place)
    assert "runs" in run("incident", "list", *place)
    output = tmp_path / "it.tar.gz"
    ended = said("incident", "stop", "--output", output, *place)
    assert (ended["id"], ended["path"]) == (begun["id"], str(output))
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    with tarfile.open(output) as tar:
        assert f"{begun['id']}/postmortem.md" in tar.getnames()
    [listed] = said("incident", "list", *place)["incidents"]
    assert listed["title"] == "It [red]is[/red] slow"
    again = tmp_path / "again.tar.gz"
    said("incident", "get", begun["id"], "--output", again, *place)
    assert again.read_bytes() == output.read_bytes()
    with pytest.raises(FairleadError, match="no incident runs"):
        run("incident", "stop", *place)
    with pytest.raises(FairleadError, match="there is no incident"):
        run("incident", "get", "20260101T000000Z-abcd", "--output", tmp_path / "none.tar.gz", *place)
    assert not (tmp_path / "none.tar.gz").exists()


def test_an_incident_outlives_a_server_that_is_killed(tmp_path):
    config = tmp_path / "fairlead.yaml"
    config.write_text(CONFIG.replace("FOLDER", str(tmp_path / "incidents")))
    write_model(tmp_path / "models", "identity", IDENTITY)
    with serving(tmp_path / "models", "--config", config) as first:
        first.begin()
        begun = said("incident", "start", "--title", "killed", "--url", first.ops)
        first.process.kill()
        first.process.wait(30)
    with serving(tmp_path / "models", "--config", config) as second:
        second.begin()
        if not any(line["event"] == "incident_found" for line in second.log):
            second.wait_for("incident_found")
        ended = said("incident", "stop", "--output", tmp_path / "it.tar.gz", "--url", second.ops)
        assert (ended["id"], ended["title"], ended["restarts"]) == (begun["id"], "killed", 1)
    with tarfile.open(tmp_path / "it.tar.gz") as tar:
        assert {"start", "metrics"} <= {name.split("/")[1] for name in tar.getnames()}


def test_where_no_server_is_that_is_said():
    for command in (("slo", "list"), ("slo", "suggest"), ("incident", "list")):
        with pytest.raises(FairleadError, match="Is `fairlead serve` running there"):
            run(*command, "--url", "http://127.0.0.1:9")


def test_rules_need_no_server(tmp_path):
    config = tmp_path / "fairlead.yaml"
    config.write_text("slos: [{name: available}]\n")
    groups = yaml.safe_load(run("slo", "rules", "--config", config, "--runbooks", "https://wiki.example"))["groups"]
    assert [group["name"] for group in groups] == ["fairlead-slo-available", "fairlead"]
    assert said("slo", "rules")["groups"][0]["name"] == "fairlead"


def page(good, bad, buckets, *, model="m", histogram="fairlead_request_seconds"):
    lines = [
        f'fairlead_requests_total{{model="{model}",version="1",outcome="success"}} {good}',
        f'fairlead_requests_total{{model="{model}",version="1",outcome="failure"}} {bad}',
        f"# TYPE {histogram} histogram",
        *(f'{histogram}_bucket{{model="{model}",version="1",le="{edge}"}} {number}' for edge, number in buckets.items()),
    ]
    return "\n".join(lines) + "\n"


def test_suggestions_leave_room_and_want_some_traffic():
    buckets = {"0.1": 9000, "0.5": 19_950, "1": 20_000, "+Inf": 20_000}
    available, latency = suggested(page(19_990, 10, buckets))
    assert (available["target"], latency["threshold"], latency["target"]) == (0.999, 0.625, 0.99)
    assert suggested(page(100, 0, {"1": 100, "+Inf": 100})) == []
    assert [each["kind"] for each in suggested(page(20_000, 0, {"1": 0, "+Inf": 20_000}))] == ["availability"]
    tokens = page(500, 0, {"1": 500, "+Inf": 500}) + page(
        500, 0, {"0.25": 500, "+Inf": 500}, histogram="fairlead_time_to_first_token_seconds"
    )
    assert [each["kind"] for each in suggested(tokens)] == ["availability", "time_to_first_token"]
    odd = suggested(page(500, 0, {"1": 500, "+Inf": 500}, model="Org/Modell ü"))
    assert parse_settings(yaml.safe_dump({"slos": odd}), "odd").slos[0].name == "Org-Modell-available"
