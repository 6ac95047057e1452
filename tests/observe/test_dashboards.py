"""The dashboards are what the table of metrics says, and the committed files are these."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from fairlead.cli import cli
from fairlead.core.errors import ConfigError
from fairlead.observe.dashboards.boards import DASHBOARDS
from fairlead.observe.dashboards.grafana import WIDTH, files, rendered
from fairlead.observe.dashboards.queries import mean, now, quantile, rate
from fairlead.observe.table import TABLE

COMMITTED = Path(__file__).parents[2] / "deploy" / "grafana"


def test_the_committed_files_are_those_that_are_made():
    """If not: `fairlead dashboards --out deploy/grafana`."""
    assert {path.name: path.read_text() for path in COMMITTED.iterdir()} == files()


def test_a_query_has_the_unit_of_its_metric():
    assert quantile(0.99, "fairlead_request_seconds").unit == "s"
    assert now("process_resident_memory_bytes").unit == "bytes"
    assert now("fairlead_kv_used_ratio", "model").unit == "percentunit"
    assert rate("fairlead_requests_total").unit == "reqps"
    assert rate("fairlead_generated_tokens_total").unit == "suffix: tokens/s"


def test_a_query_selects_by_what_its_metric_has():
    assert rate("fairlead_gateway_refused_total", "reason").expr == (
        'sum by (reason) (rate(fairlead_gateway_refused_total{model=~"$model"}[$__rate_interval]))'
    )
    assert now("fairlead_replicas", state="failed").expr == 'sum (fairlead_replicas{model=~"$model",version=~"$version",state=~"failed"})'
    assert rate("process_cpu_seconds_total").expr == "sum (rate(process_cpu_seconds_total[$__rate_interval]))"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: rate("fairlead_made_up_total"),
        lambda: rate("fairlead_requests_total", "tenant"),
        lambda: rate("fairlead_queue_requests"),
        lambda: now("fairlead_requests_total"),
        lambda: quantile(0.5, "fairlead_rows_total"),
        lambda: mean("fairlead_rows_total"),
        lambda: now("fairlead_replicas", tenant="acme"),
    ],
)
def test_what_the_table_does_not_have_cannot_be_asked(wrong):
    with pytest.raises((AssertionError, KeyError)):
        wrong()


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.name)
def test_panels_fit_side_by_side_and_every_variable_is_used_and_defined(board):
    made = rendered(board)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"], p["gridPos"]["w"], p["gridPos"]["h"]) for p in made["panels"]]
    taken = [(x + dx, y + dy) for x, y, w, h in places for dx in range(w) for dy in range(h)]
    assert len(taken) == len(set(taken)) and all(x + w <= WIDTH for x, _, w, _ in places)
    assert len({p["id"] for p in made["panels"]}) == len(made["panels"])
    exprs = [target["expr"] for p in made["panels"] for target in p.get("targets", ())]
    asked = {name for expr in exprs for name in re.findall(r"\$(\w+)", expr)} - {"__rate_interval"}
    assert asked == set(board.variables)
    assert [v["name"] for v in made["templating"]["list"]] == ["datasource", *board.variables]
    assert {target["datasource"]["uid"] for p in made["panels"] for target in p.get("targets", ())} == {"${datasource}"}


def test_titles_and_names_are_told_apart():
    made = [rendered(board) for board in DASHBOARDS]
    for key in ("title", "uid"):
        assert len({each[key] for each in made}) == len(made)
    assert all(len(each["uid"]) <= 40 for each in made)  # Grafana's bound


def test_the_command_writes_them_and_says_where(tmp_path):
    result = CliRunner().invoke(cli, ["dashboards", "--out", str(tmp_path / "new" / "folder"), "--json"])
    written = [Path(each) for each in json.loads(result.stdout)["written"]]
    assert {path.name: path.read_text() for path in written} == files()
    again = CliRunner().invoke(cli, ["dashboards", "--out", str(tmp_path / "new" / "folder")])
    assert "overview.json" in again.stdout and again.exit_code == 0


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    result = CliRunner().invoke(cli, ["dashboards", "--out", str(tmp_path / "file")])
    assert isinstance(result.exception, ConfigError) and "cannot write dashboards" in str(result.exception)


def test_most_of_the_table_is_on_some_dashboard():
    """What is not is for alerts, or other names of the same."""
    text = json.dumps([rendered(board) for board in DASHBOARDS])
    missing = [name for name, metric in TABLE.items() if metric.group not in ("triton", "vllm") and name not in text]
    assert len(missing) < len(TABLE) / 4, missing
