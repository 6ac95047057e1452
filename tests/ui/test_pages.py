"""The pages about requests, jobs, tenants, objectives, logs, audit and configuration: a real server, a real browser, what somebody does there."""

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.ui.stage import PHONE, Stage, Tab, bright, echo, python, slow_painter, stage, tab

NASTY = "<img src=x onerror=window.hit=1>"
FAILS = """
class Model:
    def infer(self, inputs):
        raise ValueError("<script>window.hit=1</script> it broke")
"""
FAILS_SPEC = """
inputs: [{name: x, datatype: FP32, shape: [-1, 1]}]
outputs: [{name: y, datatype: FP32, shape: [-1, 1]}]
instances: {isolation: thread}
"""
EXTRA = """
store: {{url: 'sqlite:///{folder}/fairlead.db', flush_seconds: 0.1}}
slos:
  - {{name: echo-answers, model: echo, target: 0.999}}
  - {{name: nasty-answers, model: '<img src=x onerror=window.hit=1>', target: 0.9}}
incidents: {{folder: '{folder}/incidents'}}
gateway:
  tenants: {{acme: {{limits: {{tokens_per_minute: 1000}}}}}}
  models: {{far: {{upstreams: [{{url: 'http://127.0.0.1:9'}}]}}}}
"""
PAGES = {
    "requests": "Requests",
    "jobs": "Jobs",
    "slo": "Objectives",
    "logs": "Logs",
    "tenants": "Tenants",
    "tenants?tab=keys": "Tenants",
    "tenants/acme": "acme",
    "audit": "Audit",
    "config": "Configuration",
    "playground?model=echo&with=echo": "Playground",
    "playground?model=bright": "Playground",
    "playground?model=slow": "Playground",
}


def asked(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"content-type": "application/json"}), timeout=20) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    nasty = python(NASTY, FAILS, FAILS_SPEC)
    with stage(tmp_path_factory.mktemp("stage"), bright, echo, slow_painter, nasty, extra=EXTRA) as running:
        asked(f"{running.ops}/admin/tenants", {"name": "acme", "policy": {"limits": {"tokens_per_day": 100, "requests_per_minute": 9}}})
        chat = {"model": "echo", "messages": [{"role": "user", "content": NASTY}]}
        asked(f"{running.http}/v1/chat/completions", chat)
        tensor = {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}
        with pytest.raises(urllib.error.HTTPError):
            asked(f"{running.http}/v2/models/{urllib.parse.quote(NASTY, safe='')}/infer", {"inputs": [tensor]})
        yield running


@pytest.fixture
def seen(server: Stage, browser: Browser) -> Iterator[Tab]:
    with tab(browser, server.ops) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_each_page_can_be_used_by_everybody(server: Stage, browser: Browser, page: str, dark: bool) -> None:
    with tab(browser, server.ops, color_scheme="dark" if dark else "light") as seen:
        seen.open(f"/ui/{page}")
        expect(seen.page.get_by_role("heading", level=1)).to_have_text(PAGES[page])
        expect(seen.page.locator("[aria-busy=true]")).to_have_count(0)
        assert seen.barriers() == []
        seen.page.set_viewport_size({"width": PHONE["width"], "height": PHONE["height"]})
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_a_failed_request_is_found_and_explained(seen: Tab) -> None:
    page = seen.open("/ui/requests")
    page.get_by_role("group", name="Which requests").get_by_role("button", name="Failed").click()
    row = page.get_by_role("row").filter(has_text=NASTY)
    expect(row).to_contain_text("500")
    row.get_by_role("link").first.click()
    expect(page.get_by_role("alert")).to_contain_text("it broke")
    expect(page.get_by_role("list", name="Phases, in their order").get_by_role("listitem")).not_to_have_count(0)
    expect(page.get_by_role("region", name="What happened")).to_contain_text("ended")

    page.get_by_role("navigation", name="Where this is").get_by_role("link", name="Requests").click()
    page.get_by_label("Model", exact=True).fill("echo")
    expect(page.get_by_role("region", name="Requests", exact=True).last.get_by_role("row")).to_have_count(2)
    assert "model=echo" in page.url


def test_a_request_that_nobody_remembers(seen: Tab) -> None:
    page = seen.open("/ui/requests/nobody-knows-it")
    expect(page.get_by_text("It is not kept any more")).to_be_visible()


def test_a_job_shows_how_far_it_is_and_is_cancelled(seen: Tab, server: Stage) -> None:
    asked(f"{server.http}/v1/jobs", {"model": "slow", "input": {"prompt": NASTY, "num_steps": 200}, "metadata": {"for": NASTY}})
    page = seen.open("/ui/jobs")
    row = page.get_by_role("row").filter(has_text="slow")
    expect(row).to_contain_text("active")
    expect(row).to_contain_text("/ 200")
    row.get_by_role("link").click()
    expect(page.get_by_text(NASTY)).to_be_visible()  # the caller's notes
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
    expect(page.get_by_text("aborted")).to_be_visible()
    page.goto(f"{server.ops}/ui/audit?action=job.cancel")
    expect(page.get_by_role("region", name="Audit log").last.get_by_role("row")).to_have_count(2)


def test_a_model_with_a_nasty_name_is_tried_and_its_error_is_text(seen: Tab) -> None:
    page = seen.open("/ui/playground")
    page.get_by_label("Model", exact=True).select_option(NASTY)
    page.get_by_label("Value").fill("1")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("it broke")
    page.get_by_role("button", name="Copy as code").click()
    expect(page.get_by_role("dialog").locator("pre")).to_contain_text("%3Cimg%20src%3Dx%20onerror%3Dwindow.hit%3D1%3E/infer")


def test_another_servers_model_takes_tools_as_far_as_this_one_knows(seen: Tab) -> None:
    page = seen.open("/ui/playground?model=far")
    page.get_by_label("Tools").fill("[1")
    page.get_by_label("Message", exact=True).fill("hello")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_text("`tools` is no JSON")).to_be_visible()
    page.get_by_label("Tools").fill("[]")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("log").get_by_role("alert")).to_contain_text("unavailable")


def test_a_key_is_shown_once_and_revoked(seen: Tab, server: Stage) -> None:
    page = seen.open("/ui/tenants/acme")
    page.get_by_role("button", name="New key").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill(f"laptop {NASTY}")
    dialog.get_by_label("Models", exact=True).fill("echo, bright*")
    dialog.get_by_label("Days").fill("30")
    dialog.get_by_role("button", name="Make it").click()
    secret = dialog.locator("pre").inner_text()
    assert re.fullmatch(r"fl_\w+", secret)
    dialog.get_by_role("button", name="I have it").click()
    row = page.get_by_role("row").filter(has_text="laptop")
    expect(row).to_contain_text("live")
    expect(row).to_contain_text("echo, bright*")
    assert secret not in page.content()
    row.get_by_role("button", name=re.compile("Revoke")).click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    expect(row).to_contain_text("revoked")
    assert [key["state"] for key in asked(f"{server.ops}/admin/keys?tenant=acme")["keys"]] == ["revoked"]


def test_limits_are_shown_with_what_is_used_of_them_and_changed(seen: Tab, server: Stage) -> None:
    page = seen.open("/ui/tenants/acme")
    limits = page.get_by_role("region", name="Limits", exact=True)
    expect(limits).to_contain_text("tokens_per_day")
    expect(limits.get_by_role("meter", name="Used of tokens_per_day")).to_be_visible()
    page.get_by_role("button", name="Change limits").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("One limit a line").fill("tokens_per_day: 200\nbananas_per_day: 3")
    dialog.get_by_role("button", name="Change them").click()
    expect(dialog).to_contain_text("`bananas_per_day` is no limit")
    dialog.get_by_label("One limit a line").fill("tokens_per_day: 200")
    dialog.get_by_role("button", name="Change them").click()
    expect(limits).to_contain_text("of 200")
    assert asked(f"{server.ops}/admin/tenants/acme")["policy"]["limits"] == {"tokens_per_day": 200}


def test_a_tenant_comes_and_goes(seen: Tab) -> None:
    page = seen.open("/ui/tenants")
    page.get_by_role("button", name="New tenant").click()
    page.get_by_role("dialog").get_by_label("Name").fill("no good name")
    page.get_by_role("dialog").get_by_role("button", name="Make it").click()
    expect(page.get_by_role("dialog").locator(".error")).not_to_be_empty()
    page.get_by_role("dialog").get_by_label("Name").fill("passing")
    page.get_by_role("dialog").get_by_role("button", name="Make it").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("passing")
    page.get_by_role("button", name="Disable").click()
    page.get_by_role("dialog").get_by_role("button", name="Disable").click()
    expect(page.get_by_text("disabled")).to_be_visible()
    page.get_by_role("button", name="Delete this tenant").click()
    sure = page.get_by_role("dialog")
    expect(sure.get_by_role("button", name="Delete")).to_be_disabled()
    sure.get_by_label("Type passing to go on").fill("passing")
    sure.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Tenants")
    expect(page.get_by_role("link", name="passing")).to_have_count(0)


def test_objectives_say_what_is_promised_and_what_is_left(seen: Tab) -> None:
    page = seen.open("/ui/slo")
    card = page.get_by_role("region", name="echo-answers")
    expect(card).to_contain_text("99.9% of requests are answered, of echo")
    expect(card.get_by_role("meter")).to_have_attribute("aria-valuenow", "100")
    nasty = page.get_by_role("region", name="nasty-answers")
    expect(nasty.get_by_role("meter")).to_have_attribute("aria-valuenow", "0")  # its one request failed
    expect(nasty).to_contain_text("Too few for an alert")


def test_an_incident_is_started_and_stopped(seen: Tab) -> None:
    page = seen.open("/ui/slo")
    page.get_by_role("button", name="Start an incident").click()
    page.get_by_role("dialog").get_by_label("What is wrong").fill(f"slow {NASTY}")
    page.get_by_role("dialog").get_by_role("button", name="Start").click()
    row = page.get_by_role("region", name="Incidents").get_by_role("row").filter(has_text="slow")
    expect(row).to_contain_text("runs")
    page.get_by_role("button", name="Stop it").click()
    page.get_by_role("dialog").get_by_role("button", name="Stop").click()
    expect(row).to_contain_text("over")
    with page.expect_download() as download:
        row.get_by_role("link").click()
    assert download.value.suggested_filename.endswith(".tar.gz")


def test_lines_are_read_and_a_room_writes_more_for_a_while(seen: Tab) -> None:
    page = seen.open("/ui/logs")
    lines = page.get_by_role("list", name="Lines")
    expect(lines).to_contain_text("model loaded")
    page.get_by_label("Level of gateway").select_option("debug")
    expect(page.get_by_text("gateway writes debug and above")).to_be_visible()
    expect(page.get_by_role("row").filter(has_text="gateway").first).to_contain_text("left")
    expect(lines).to_contain_text("log_levels_set")
    page.get_by_label("Level", exact=True).select_option("error")
    expect(lines.get_by_text("log_levels_set")).to_have_count(0)


def test_policies_are_changed_and_brought_back(seen: Tab, server: Stage) -> None:
    page = seen.open("/ui/config")
    expect(page.get_by_label("Policies, as YAML")).to_contain_text("tokens_per_minute: 1000")
    before = asked(f"{server.ops}/admin/config")["text"]
    for text, said in ((before.replace("1000", "none"), "Expected"), (before.replace("1000", "2000"), "")):
        page.get_by_role("button", name="Change", exact=True).click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("textbox").fill(text)
        dialog.get_by_role("button", name="Change them").click()
        if said:
            expect(dialog.get_by_role("alert")).to_contain_text(said)
            dialog.get_by_role("button", name="Cancel").click()
        expect(dialog).to_be_hidden()
    expect(page.get_by_label("Policies, as YAML")).to_contain_text("tokens_per_minute: 2000")
    page.get_by_role("button", name="Roll back").click()
    page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    expect(page.get_by_label("Policies, as YAML")).to_contain_text("tokens_per_minute: 1000")


def test_without_a_store_a_page_says_what_is_missing(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    off = "jobs: {{enabled: false}}\ncontrol: {{enabled: false}}\n"
    with stage(tmp_path_factory.mktemp("bare"), bright, extra=off) as bare, tab(browser, bare.ops) as seen:
        for name in ("tenants", "jobs", "audit", "config"):
            page = seen.open(f"/ui/{name}")
            expect(page.get_by_text("It needs a store")).to_be_visible()
