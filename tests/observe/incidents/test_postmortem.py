"""The first draft of a post-mortem: what is known stands in it, and nothing of it is taken for Markdown."""

from fairlead.observe.incidents.exhibits import Happening, Rows
from fairlead.observe.incidents.impact import Impact, OfModel, OfObjective, grown, impact_of, values_of
from fairlead.observe.incidents.postmortem import MAX_HAPPENINGS, Facts, lasted, plain, postmortem

BEGAN = 1_790_000_000.0


def facts(**changes):
    given = {
        "id": "20260921T141320Z-abcd",
        "title": "Nothing works",
        "server": "one",
        "release": "1.2.3",
        "began": BEGAN,
        "ended": BEGAN + 5400.0,
        "impact": Impact({}, {}),
        "happenings": (),
        "versions": (),
        "alerts": (),
        "files": (),
        "missing": (),
    }
    return Facts(**{**given, **changes})


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_summary_says_what_is_known():
    text = postmortem(facts(impact=Impact({"m": OfModel(requests=100, failed=7, refused=3, versions=("2",))}, {})))
    assert text.startswith("# Post-mortem: Nothing works\n")
    for row in (
        "| Incident | 20260921T141320Z-abcd |",
        "| Began (UTC) | 2026-09-21 14:13:20 |",
        "| Lasted | 1 h 30 min |",
        "| Requests that failed | 7 |",
        "| Requests that were refused | 3 |",
        "| m | 100 | 7 | 7.00% | 3 | 2 |",
    ):
        assert row in text


def test_the_timeline_is_what_happened_meanwhile_and_changes_before_stand_apart():
    happenings = (
        Happening(BEGAN - 600.0, "admin: config.put gateway", change=True),
        Happening(BEGAN - 500.0, "gateway: abuse.throttle acme"),
        Happening(BEGAN + 60.0, "rollout r1: aborted", change=True),
    )
    alerts = [("FairleadBudgetBurn", "page", "api", BEGAN - 30.0)]
    text = postmortem(facts(happenings=happenings, alerts=alerts))
    rows = [line.split(" | ")[1].removesuffix(" |") for line in section(text, "Timeline").splitlines() if line.startswith("| 2026")]
    assert rows == [
        "FairleadBudgetBurn (page) fires for api",
        "the incident was begun",
        "rollout r1: aborted",
        "the incident was ended",
    ]
    before = section(text, "What changed before")
    assert "config.put gateway" in before
    assert "abuse.throttle" not in before


def test_nothing_that_people_or_models_say_becomes_markdown():
    odd = "a | b\n# c `d` [e](f) <script> *g* _h_"
    text = postmortem(
        facts(
            title=odd,
            happenings=(Happening(BEGAN, odd),),
            versions=[(odd, "1", "x")],
            shown=[Rows("Errors", ("error",), ((odd,),))],
            missing=[("x.json", odd)],
        )
    )
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert plain(odd) in text and "\n# c" not in text
    assert plain(odd).count("\\|") == 1
    for line in text.splitlines():
        if line.startswith("| ") and "script" in line:
            assert line.replace("\\|", "").count("|") in (2, 3, 4)


def test_a_timeline_is_bounded():
    text = postmortem(facts(happenings=[Happening(BEGAN + number, f"event {number}") for number in range(1000)]))
    assert text.count("| event ") == MAX_HAPPENINGS - 1
    assert "802 earlier ones are in the archive only" in text


def test_budgets_and_files_are_told():
    impact = Impact({}, {"api": OfObjective(good=90, bad=10, before=0.8, after=0.55)})
    text = postmortem(facts(impact=impact, files=["slo.json"], missing=[("audit.json", "Unavailable: the store does not answer")]))
    assert "| api | 90 | 10 | 80.0% | 55.0% | 25.0% |" in text
    assert "* `slo.json`" in text
    assert "* `audit.json` is missing: Unavailable: the store does not answer" in text


def page(success, failure, budget, *, refused=0, version="1"):
    return values_of(
        "# TYPE fairlead_requests counter\n"
        f'fairlead_requests_total{{model="m",version="{version}",outcome="success"}} {success}\n'
        f'fairlead_requests_total{{model="m",version="{version}",outcome="failure"}} {failure}\n'
        f'fairlead_gateway_refused_total{{model="m",reason="queue-full"}} {refused}\n'
        f'fairlead_slo_events_total{{slo="api",outcome="bad"}} {failure}\n'
        f'fairlead_slo_budget_ratio{{slo="api"}} {budget}\n'
        "process_cpu_seconds_total 5\nsomething odd { is here\n"
    )


def test_what_an_incident_cost_is_what_counters_grew_by():
    impact = impact_of([page(1000, 5, 0.9, refused=2), page(1100, 25, 0.7, refused=2), page(1200, 45, 0.4, refused=12)])
    assert impact.models["m"] == OfModel(requests=240, failed=40, refused=10, versions=("1",))
    assert impact.objectives["api"] == OfObjective(good=0, bad=40, before=0.9, after=0.4)


def test_a_server_that_began_again_meanwhile_is_added():
    impact = impact_of([page(1000, 5, 0.9), page(1010, 15, 0.9), page(3, 2, 0.9), page(7, 4, 0.8)])
    assert (impact.models["m"].requests, impact.models["m"].failed) == (10 + 7 + 10 + 4, 10 + 4)


def test_without_samples_nothing_is_known():
    assert impact_of([]) == Impact({}, {})
    assert grown([page(1, 1, 1)]) == {}
    assert "No requests came" in postmortem(facts())


def test_spans_are_told_as_people_do():
    assert [lasted(seconds) for seconds in (-1.0, 5.0, 600.0, 7260.0)] == ["0 min 0 s", "0 min 5 s", "10 min 0 s", "2 h 1 min"]
