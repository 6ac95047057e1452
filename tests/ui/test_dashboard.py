"""The dashboard in a real browser, with live data: every core page, by mouse, by keyboard, on a phone, in dark and in light."""

import re

import pytest
from playwright.sync_api import Browser, Route, expect

from fairlead.core.policy import Scope
from tests.ui.conftest import AUDIT, HOSTILE, NUM_IDLE, House, Visit, login, new_visit

PAGES = {
    "overview": ("/ui/overview", "Busiest models", "scores"),
    "models": ("/ui/models", "Models", "assistant"),
    "model": ("/ui/models/scores", "Requests per second", "p99"),
    "versions": ("/ui/models/fraud?tab=versions", "Versions in the registry", "fraud@2"),
    "rollouts": ("/ui/rollouts", "Deployed", "fraud"),
    "replicas": ("/ui/replicas", "KV memory", "assistant"),
}
"""Name → address, a text that is there, and one that comes from the server."""


def test_who_shows_no_good_key_stays_outside(browser: Browser, house: House) -> None:
    visit = new_visit(browser, house)
    page = visit.page
    page.goto(f"{house.ops}/ui/models")
    expect(page.get_by_role("heading", name="Fairlead")).to_be_visible()
    assert visit.barriers() == []
    visit.shot("login")
    page.get_by_label("Key").fill("fl_wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_text("not valid")).to_be_visible()
    page.get_by_label("Key").fill(house.new_key(Scope.INFER).secret)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_text(re.compile("no scope 'admin'|not valid"))).to_be_visible()
    page.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_each_page_shows_what_is_so_and_keeps_nobody_out(visit: Visit, name: str) -> None:
    address, heading, told = PAGES[name]
    visit.go(address)
    main = visit.page.locator("main")
    expect(main.get_by_text(heading).first).to_be_visible()
    expect(main.get_by_text(told).first).to_be_visible()
    expect(visit.page.locator(".skeleton")).to_have_count(0)
    for dark in (False, True):
        visit.dark(dark)
        assert visit.barriers() == []
        visit.shot(f"{name}-{'dark' if dark else 'light'}")


@pytest.mark.parametrize("name", PAGES)
def test_each_page_fits_a_phone(visit: Visit, name: str) -> None:
    visit.page.set_viewport_size({"width": 390, "height": 844})
    visit.go(PAGES[name][0])
    expect(visit.page.locator("main").get_by_text(PAGES[name][2]).first).to_be_visible()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    if name == "overview":
        assert visit.barriers() == []
        expect(visit.page.get_by_role("link", name="Models", exact=True)).to_be_hidden()
        visit.page.get_by_role("button", name="Navigation").click()
        visit.page.get_by_role("link", name="Models", exact=True).click()
        expect(visit.page.get_by_role("heading", name="Models", level=1)).to_be_visible()
        visit.go("/ui/overview")
    visit.shot(f"{name}-phone")


def test_the_numbers_are_live(visit: Visit) -> None:
    visit.go("/ui/overview")
    expect(visit.page.get_by_text("Live", exact=True)).to_be_visible()
    requests = visit.page.locator(".stat", has_text="Requests").locator("dd").first
    expect(requests).to_have_text(re.compile(r"[1-9]"))
    expect(visit.page.get_by_text("model-error")).to_be_visible()
    expect(visit.page.get_by_text("not-found")).to_be_visible()


def test_everything_is_reached_by_keyboard(visit: Visit) -> None:
    page = visit.page
    visit.go("/ui/overview")
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the page")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.keyboard.press("g")
    page.keyboard.press("m")
    expect(page.get_by_role("heading", name="Models", level=1)).to_be_visible()
    page.keyboard.press("/")
    expect(page.get_by_role("combobox")).to_be_focused()
    page.keyboard.type("scores")
    expect(page.get_by_role("option", name="scores")).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="scores", level=1)).to_be_visible()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    assert visit.barriers() == []
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Keys")).to_be_hidden()
    page.get_by_role("tab", name="Now").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Versions")).to_be_focused()


def test_a_name_is_text_whatever_is_in_it(visit: Visit) -> None:
    page = visit.page
    visit.go("/ui/models")
    page.get_by_role("link", name=HOSTILE).click()
    expect(page.get_by_role("heading", name=HOSTILE)).to_be_visible()
    visit.go("/ui/models/fraud?tab=versions")
    page.get_by_role("button", name="fraud@1", exact=True).click()
    expect(page.get_by_text("<b>retrained</b>")).to_be_visible()
    visit.shot("version")
    page.get_by_role("button", name="Close").click()
    assert page.locator("main img").count() == 0


def test_ten_thousand_models_are_searched_and_scrolled(visit: Visit) -> None:
    page = visit.page
    visit.go("/ui/models")
    expect(page.get_by_text(re.compile(r"10,00\d models"))).to_be_visible()
    table = page.get_by_role("region", name="Models").last
    assert page.locator("tbody tr").count() < 100
    table.evaluate("(box) => { box.scrollTop = box.scrollHeight }")
    expect(page.get_by_role("link", name=f"idle-{NUM_IDLE - 1:05}")).to_be_visible()
    page.get_by_label("Search models").fill("idle 0777")
    expect(page.get_by_role("link", name="idle-07770")).to_be_visible()
    expect(page.get_by_text("11 models with")).to_be_visible()
    page.get_by_label("Search models").fill("nothing has that name")
    expect(page.get_by_text("No model fits")).to_be_visible()
    visit.shot("models-none")


def test_a_model_is_loaded_and_unloaded_and_asks_first(visit: Visit) -> None:
    page = visit.page
    visit.go("/ui/models/flaky")
    page.get_by_role("button", name="Unload flaky").click()
    dialog = page.get_by_role("dialog", name="Unload flaky?")
    expect(dialog).to_be_visible()
    assert visit.barriers() == []
    visit.shot("confirm")
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()
    page.get_by_role("button", name="Unload flaky").click()
    page.get_by_role("dialog").get_by_role("button", name="Unload").click()
    expect(page.get_by_role("heading", level=1).get_by_text("Unloaded")).to_be_visible()
    page.get_by_role("button", name="Load flaky").click()
    expect(page.get_by_role("heading", level=1).get_by_text("Ready")).to_be_visible()


def test_a_rollout_is_started_paused_and_aborted(visit: Visit, house: House) -> None:
    page = visit.page
    visit.go("/ui/rollouts")
    page.get_by_role("button", name="Start a rollout").click()
    form = page.get_by_role("dialog", name="Start a rollout")
    form.get_by_label("Model").select_option("fraud")
    form.get_by_label("Policy").select_option("standard")
    form.get_by_label("Why").fill("<i>because</i>")
    assert visit.barriers() == []
    form.get_by_role("button", name="Start with fraud@2").click()
    expect(page.get_by_role("heading", name="Rollout of fraud@2")).to_be_visible()
    page.get_by_role("button", name="Pause").click(timeout=60_000)
    asked = page.get_by_role("dialog", name="Pause the rollout of fraud@2?")
    asked.get_by_label("Why").fill("lunch")
    asked.get_by_role("button", name="Pause").click()
    expect(page.get_by_text("Paused: somebody paused it")).to_be_visible()
    assert visit.barriers() == []
    visit.shot("rollout-paused")
    page.get_by_role("button", name="Abort").click()
    asked = page.get_by_role("dialog", name="Abort the rollout of fraud@2?")
    expect(asked.get_by_text("All traffic goes back to fraud@1 at once.")).to_be_visible()
    asked.get_by_role("button", name="Abort").click()
    expect(page.get_by_text("Everything goes to the champion")).to_be_visible()
    assert house.ask("/admin/rollouts/fraud")[1]["phase"] == "aborted"
    visit.go("/ui/rollouts")
    page.get_by_role("button", name="Undeploy fraud").click()
    asked = page.get_by_role("dialog", name="Undeploy fraud?")
    expect(asked.get_by_role("button", name="Undeploy")).to_be_disabled()  # until its name is typed
    asked.get_by_role("button", name="Cancel").click()


def test_what_fails_says_so_and_can_be_tried_again(visit: Visit) -> None:
    page = visit.page

    def fails(route: Route) -> None:
        route.fulfill(
            status=503,
            content_type="application/problem+json",
            body='{"title": "Service Unavailable", "status": 503, "detail": "the store is away"}',
        )

    page.route("**/admin/replicas", fails)
    visit.go("/ui/replicas")
    expect(page.get_by_text("the store is away")).to_be_visible()
    assert visit.barriers() == []
    visit.shot("failure")
    page.unroute("**/admin/replicas")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("All replicas")).to_be_visible()
    visit.wrong[:] = [each for each in visit.wrong if "503" not in each]


def test_the_session_of_a_revoked_key_ends_in_the_open_tab(browser: Browser, house: House) -> None:
    key = house.new_key(Scope.ADMIN)
    visit = new_visit(browser, house)
    login(visit, key)
    visit.go("/ui/replicas")
    house.store.revoke_key(key.id, AUDIT, force=True)
    expect(visit.page.get_by_role("button", name="Log in")).to_be_visible()
    visit.page.context.close()
