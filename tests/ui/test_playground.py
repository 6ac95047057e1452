"""The playground in a real browser, before real small models: what somebody asks there, and the code that they take along."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from fairlead.app_demo import open_demo
from fairlead.core.policy import Scope
from fairlead.gateway.identity.keys import new_key
from fairlead.store.rows import AuditRow, KeyRow
from fairlead.store.store import Store
from tests.ui.stage import (
    PHONE,
    SHOUT,
    SHOUT_SPEC,
    Stage,
    Tab,
    assistant,
    bright,
    echo,
    iris,
    painter,
    python,
    shout,
    slow_painter,
    stage,
    tab,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("stage"), assistant, painter, iris, bright, shout, echo, slow_painter) as running:
        yield running


@pytest.fixture
def seen(server: Stage, browser: Browser) -> Iterator[Tab]:
    with tab(browser, server.ops) as opened:
        yield opened


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def snippet(page: Page, label: str) -> str:
    """The request as code."""
    page.get_by_role("button", name="Copy as code").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("tab", name=label, exact=True).click()
    text = dialog.get_by_role("tabpanel").locator("pre").inner_text()
    dialog.get_by_role("button", name="Close").click()
    return text


def ran(text: str, label: str, folder: Path) -> str:
    """What a snippet says when it runs as it stands."""
    command = ["bash", "-c", text] if label == "curl" else [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Chats


def test_a_chat_streams_into_the_page_and_says_how_fast_it_was(seen: Tab) -> None:
    page = seen.open("/ui/playground?model=assistant")
    page.get_by_label("Temperature").fill("0")
    say(page, "What is 17 + 25?")
    log = page.get_by_role("log")
    expect(log).to_contain_text("so 42")
    numbers = log.locator(".try-numbers")
    expect(numbers).to_contain_text("in all")
    assert re.fullmatch(
        r"first token [\d.]+ m?s · 29 tokens( · [\d,]+ tokens/s)? · [\d.]+ m?s in all · prompt 18.*", (numbers.inner_text()).strip()
    )

    say(page, "What is 1 + 1?")  # the answers before are sent along
    expect(log.locator(".try-numbers").nth(1)).to_contain_text("in all")
    prompt = re.search(r"prompt (\d+)", log.locator(".try-numbers").nth(1).inner_text())
    assert prompt is not None and int(prompt[1]) > 18 + 29
    numbers.first.get_by_role("link", name="where the time went").click()
    expect(page.get_by_role("heading", name="Where the time went")).to_be_visible()


def test_two_versions_answer_the_same_question_side_by_side(seen: Tab) -> None:
    page = seen.open("/ui/playground?model=assistant@2")
    page.get_by_role("button", name="Compare").click()
    assert "with=assistant%401" in page.url
    say(page, "Sort these numbers: 42, 7, 19, 3")
    for version in ("assistant@2", "assistant@1"):
        side = page.get_by_role("region", name=version, exact=True)
        expect(side).to_contain_text("3, 7, 19, 42")
        expect(side).to_contain_text("13 tokens")
    expect(page.get_by_text("Of the last answer:")).to_contain_text("the first token")


def test_an_answer_that_goes_on_for_ever_can_be_stopped(seen: Tab, server: Stage) -> None:
    page = seen.open("/ui/playground?model=echo")
    page.get_by_label("Most tokens").fill("4000")
    say(page, "!forever again and")
    expect(page.get_by_role("log")).to_contain_text("again andagain and")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("log")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert [each["outcome"] for each in server.ended("echo")] == ["cancelled"]


def test_what_the_server_refuses_is_said_in_its_own_words(seen: Tab) -> None:
    page = seen.open("/ui/playground?model=assistant")
    page.get_by_label("Temperature").fill("5")
    say(page, "hello")
    alert = page.get_by_role("log").get_by_role("alert")
    expect(alert).to_contain_text("Invalid value for 'temperature'")
    expect(alert).to_contain_text("400 · invalid_value · parameter temperature")

    page.get_by_label("Temperature").fill("")
    page.get_by_text("More parameters").click()
    page.get_by_label("Anything else, as JSON").fill('{"guided_json": {}}')
    say(page, "hello")
    expect(page.get_by_role("log").get_by_role("alert").nth(1)).to_contain_text("structured_outputs")

    page.get_by_label("Anything else, as JSON").fill("{")
    say(page, "hello")
    expect(page.get_by_text("`more` is no JSON")).to_be_visible()


def test_what_is_said_is_text_and_never_a_page(seen: Tab) -> None:
    page = seen.open("/ui/playground?model=echo")
    nasty = '<img src=x onerror="window.hit=1"> ```\n<script>window.hit=1</script>\n``` [x](javascript:window.hit=1) **<b>bold</b>**'
    page.get_by_label("System message").fill("<svg onload=window.hit=1>")
    say(page, nasty)
    expect(page.get_by_role("log")).to_contain_text("in all")
    assert page.locator(".try-log img, .try-log script, .try-log svg[onload], .try-log a[href^=javascript]").count() == 0
    expect(page.get_by_role("log").locator(".try-asked")).to_contain_text('<img src=x onerror="window.hit=1">')


def test_a_text_is_continued(seen: Tab) -> None:
    page = seen.open("/ui/playground?model=assistant&task=completions")
    page.get_by_label("Text to continue").fill("What is 2 + 2?")
    page.get_by_role("button", name="Continue it").click()
    expect(page.get_by_role("log")).to_contain_text("in all")


# Pictures


def test_a_picture_is_made_and_made_again_by_its_seed(seen: Tab) -> None:
    page = seen.open("/ui/playground?model=painter")
    page.get_by_label("Prompt", exact=True).fill("a large red three")
    page.get_by_label("Steps").fill("8")
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Make it").click()
    picture = page.get_by_role("img", name="a large red three")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])") == [32, 32]
    expect(page.get_by_text("32×32, seed 7")).to_be_visible()
    page.get_by_label("Seed").fill("")
    page.get_by_role("button", name="Use this seed").click()
    expect(page.get_by_label("Seed")).to_have_value("7")


def test_a_picture_that_takes_long_shows_how_far_it_is_and_can_be_cancelled(seen: Tab) -> None:
    page = seen.open("/ui/playground?model=slow")
    page.get_by_label("Prompt", exact=True).fill("a long way")
    page.get_by_role("button", name="Make it").click()
    expect(page.get_by_role("img", name="How far it is")).to_be_visible()
    expect(page.get_by_text(re.compile(r"step \d+ of 200"))).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Make it")).to_be_visible()
    expect(page.get_by_text("Nothing was made yet")).to_be_visible()


# Tensors


def test_a_form_is_made_of_what_the_model_takes(seen: Tab) -> None:
    page = seen.open("/ui/playground?model=iris")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("X is empty")
    page.get_by_role("button", name="Example").click()
    expect(page.get_by_label("Value 1")).to_have_value("5.1")
    page.get_by_role("button", name="Ask", exact=True).click()
    answer = page.get_by_role("region", name="Answer")
    expect(answer.get_by_role("region", name="label", exact=True)).to_contain_text("0")
    expect(answer.get_by_role("region", name="probabilities", exact=True)).to_contain_text("0.98")

    page.get_by_label("Value 2").fill("many")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text('X, value 2: "many" is no number')
    page.get_by_role("group", name="How X is given").get_by_role("button", name="JSON").click()
    page.get_by_label("Values", exact=True).fill("[[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(answer.get_by_role("region", name="Values of label").get_by_role("row")).to_have_count(2)


def test_a_picture_that_is_dropped_becomes_a_tensor(seen: Tab) -> None:
    page = seen.open("/ui/playground?model=bright")
    file = BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")
    page.get_by_label("Drop a picture here").set_input_files({"name": "white.png", "mimeType": "image/png", "buffer": file.getvalue()})
    page.get_by_role("button", name="Ask", exact=True).click()
    likeliest = page.get_by_role("list", name="Likeliest first").get_by_role("listitem")
    expect(likeliest.first).to_contain_text("bright")
    page.get_by_label("Dark is bright").check()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(likeliest.first).to_contain_text("dark")
    expect(page.get_by_role("img", name="turned as a picture")).to_be_visible()
    page.get_by_label("Another picture").set_input_files({"name": "no.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.get_by_role("alert")).to_contain_text("no.png is no picture")


# Code


def test_a_chat_is_taken_along_as_code_that_runs(seen: Tab, server: Stage, tmp_path: Path) -> None:
    page = seen.open("/ui/playground?model=assistant")
    page.get_by_label("System message").fill('It\'s "you" who answers.\n\\n ✓ 🦊 $HOME `id`')
    page.get_by_label("Temperature").fill("0")
    page.get_by_text("More parameters").click()
    page.get_by_label("Top k").fill("5")
    page.get_by_label("Message", exact=True).fill("What is 17 + 25?")
    labels = ("curl", "Python (OpenAI SDK)", "Python (requests)")
    texts = [snippet(page, label) for label in labels]
    assert all(server.http.removeprefix("http://") in text and "/ui/" not in text and "csrf" not in text for text in texts)
    told, *said = (ran(text, label, tmp_path) for text, label in zip(texts, labels, strict=True))
    pieces = [json.loads(line[6:]) for line in told.splitlines() if line.startswith("data: {")]
    streamed = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert streamed and [streamed, streamed] == [each.rstrip("\n") for each in said]  # one request, however it is written


@pytest.mark.parametrize(
    ("model", "said"), [("iris", {"curl": '"data":[0]', "Python (requests)": "'label', [1], [0]", "Python (tritonclient)": "label [0]"})]
)
def test_tensors_are_taken_along_as_code_that_runs(seen: Tab, tmp_path: Path, model: str, said: dict[str, str]) -> None:
    page = seen.open(f"/ui/playground?model={model}")
    page.get_by_role("button", name="Example").click()
    texts = {label: snippet(page, label) for label in said}
    for label, text in texts.items():
        assert said[label] in ran(text, label, tmp_path), label


def test_texts_and_pictures_are_taken_along_too(seen: Tab, tmp_path: Path) -> None:
    page = seen.open("/ui/playground?model=shout")
    page.get_by_label("Text", exact=True).fill("it's 'quiet'\n\"here\" ✓")
    loud = snippet(page, "Python (tritonclient)")
    page = seen.open("/ui/playground?model=painter")
    page.get_by_label("Prompt", exact=True).fill("a 'red' three")
    page.get_by_label("Steps").fill("4")
    page.get_by_label("Seed").fill("7")
    waited, sdk = snippet(page, "Python (requests)"), snippet(page, "Python (OpenAI SDK)")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    said = ran(loud, "Python", tmp_path)
    first, _ = ran(waited, "Python", folders[0]), ran(sdk, "Python", folders[1])
    assert eval(said.removeprefix("loud "))[0][0].decode() == "IT'S 'QUIET'\n\"HERE\" ✓"
    assert first.strip() == "picture-0.png 32 32 7"
    pictures = [Image.open(folder / "picture-0.png").tobytes() for folder in folders]
    assert pictures[0] == pictures[1]  # one request, however it is written


def test_where_keys_are_asked_for_the_session_asks_and_the_code_shows_a_key(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, text = new_key(), f"auth: {{{{required: true}}}}\nstore: {{{{url: 'sqlite:///{tmp_path}/fairlead.db'}}}}\n"
    with closing(Store.open(f"sqlite:///{tmp_path}/fairlead.db")) as store:
        audit = AuditRow(time=1.0, actor="test", action="test", subject="test")
        shown = {"id": new.id, "digest": new.digest, "signing_key": new.signing_key, "prefix": new.prefix}
        store.add_key(KeyRow(tenant="default", scopes=tuple(Scope), created=1.0, **shown), audit)
    with stage(tmp_path, echo, extra=text) as running, tab(browser, running.ops) as seen:
        page = seen.open("/ui/playground?model=echo")
        page.get_by_label("Key").fill(new.secret)
        page.get_by_role("button", name="Log in").click()
        say(page, "good morning")
        expect(page.get_by_role("log").locator(".try-answer")).to_have_text("good morning")
        monkeypatch.setenv("FAIRLEAD_API_KEY", new.secret)
        page.get_by_label("Message", exact=True).fill("good evening")
        for label, said in (("curl", '"content":"good'), ("Python (OpenAI SDK)", "good evening"), ("Python (requests)", "good evening")):
            text = snippet(page, label)
            assert new.secret not in text and said in ran(text, label, tmp_path)


def test_one_of_very_many_models_is_typed(browser: Browser, tmp_path: Path) -> None:
    many = (python(f"shout-{number}", SHOUT, SHOUT_SPEC) for number in range(70))
    with stage(tmp_path, *many) as running, tab(browser, running.ops) as seen:
        page = seen.open("/ui/playground")
        expect(page.get_by_label("Text", exact=True)).to_be_visible()  # of the first one
        page.get_by_label("Model", exact=True).fill("shout-69")
        page.wait_for_url("**/ui/playground?model=shout-69")
        page.get_by_label("Text", exact=True).fill("hello")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_role("region", name="Values of loud")).to_have_text("HELLO")
        expect(page.get_by_text("shout-69, version 1")).to_be_visible()


def test_one_model_has_a_page_of_its_own(browser: Browser, tmp_path: Path) -> None:
    with stage(tmp_path, echo) as running:
        links = running.wait(open_demo(running.server, 0, guests=0))
        base, _, token = links.url.partition("/#")
        with tab(browser, base) as seen:
            page = seen.open("/")
            expect(page.get_by_text("Nobody let this browser in yet")).to_be_visible()
            page.goto("about:blank")
            page = seen.open(f"/#{token}")
            expect(page.get_by_role("heading", level=1)).to_have_text("echo")
            assert token not in page.url
            say(page, "good morning")
            expect(page.get_by_role("log").locator(".try-answer")).to_have_text("good morning")
            assert page.get_by_role("navigation").count() == 0 and page.get_by_label("Model").count() == 0
            assert seen.barriers() == []
            page.reload()
            expect(page.get_by_role("heading", level=1)).to_have_text("echo")


# What the forms and snippets are made of


@pytest.mark.parametrize(
    ("module", "call", "expected"),
    [
        ("tensors", "m.written({name: 'x', datatype: 'FP32', shape: [-1, 2]}, '1, 2 3;4').shape", [2, 2]),
        ("tensors", "m.written({name: 'x', datatype: 'FP32', shape: [-1, 2]}, '[1, 2]').shape", [1, 2]),
        ("tensors", "m.written({name: 'x', datatype: 'INT8', shape: [-1, 1]}, '[[1], [2]]').shape", [2, 1]),
        ("tensors", "m.written({name: 'x', datatype: 'BYTES', shape: [1]}, 'a [b').data", ["a [b"]),
        ("tensors", "m.written({name: 'x', datatype: 'BOOL', shape: [-1]}, 'true 0 1').data", [True, False, True]),
        ("tensors", "m.written({name: 'x', datatype: 'FP32', shape: [-1]}, '{\"shape\": [2], \"data\": [1, 2]}').shape", [2]),
        ("tensors", "no(() => m.written({name: 'x', datatype: 'FP32', shape: [-1, 2]}, '1 2 3'))", "x takes [*, 2]: 3 values do not fill that"),
        ("tensors", "no(() => m.written({name: 'x', datatype: 'UINT8', shape: [1]}, '256'))", "x, value 1: 256 does not fit UINT8"),
        ("tensors", "no(() => m.written({name: 'x', datatype: 'INT32', shape: [1]}, '1.5'))", "x, value 1: 1.5 is no whole number, which INT32 takes"),
        ("tensors", "no(() => m.written({name: 'x', datatype: 'INT64', shape: [1]}, '9007199254740993'))", "x, value 1 is too large for a browser to hold exactly"),
        ("tensors", "m.fieldOf({name: 'x', datatype: 'FP32', shape: [-1, 3, 224, 224]}).kind", "picture"),
        ("tensors", "m.fieldOf({name: 'x', datatype: 'UINT8', shape: [-1, -1, -1, 3]}).picture.layout", "HWC"),
        ("tensors", "m.fieldOf({name: 'x', datatype: 'FP32', shape: [-1, 10]}).kind", "numbers"),
        ("tensors", "m.fieldOf({name: 'x', datatype: 'FP32', shape: [-1, -1]}).kind", "json"),
        ("tensors", "[0, 1, -2, 65504, 65520, 5.960464477539063e-8, 0.1].map(m.half)", [0, 0x3C00, 0xC000, 0x7BFF, 0x7C00, 1, 0x2E66]),
        ("tensors", "m.lenient('{\"data\": [NaN, -Infinity, 1], \"s\": \"NaN\"}').data", ["NaN", "-Infinity", 1]),
        ("tensors", "m.ranked({datatype: 'FP32', shape: [1, 2], data: [0.2, 0.8]}, ['a', 'b'])", [[{"label": "b", "score": 0.8}, {"label": "a", "score": 0.2}]]),
        ("prose", "m.blocks('a\\n```py\\nb\\n```\\nc').map(each => each.kind)", ["text", "code", "text"]),
        ("prose", "m.blocks('```\\nopen').map(each => [each.kind, each.text])", [["code", "open"]]),
        ("snippets", "m.shell(\"it's\")", "'it'\\''s'"),
        ("snippets", "m.python({a: [true, null, 1.5], b: 'x\\u2028'})", '{"a": [True, None, 1.5], "b": "x\\u2028"}'),
        ("answer", "m.complaint({error: {message: 'no', code: 'c', param: 'p'}}, 400)", {"message": "no", "detail": "400 · c · parameter p"}),
        ("answer", "m.complaint({title: 'Conflict', detail: 'taken'}, 409)", {"message": "taken", "detail": "409 · Conflict"}),
        ("answer", "m.complaint('<html>', 502)", {"message": "the server answered 502", "detail": "502"}),
    ],
)  # fmt: skip
def test_small_decisions(decided: Page, module: str, call: str, expected: object) -> None:
    found = decided.evaluate(
        """async ([module, call]) => {
            const base = document.querySelector('link[rel="stylesheet"]').href.replace(/static\\/(\\w+)\\/.*/, "static/$1");
            const m = await import(`${base}/playground/${module}.js`);
            const no = (act) => { try { act(); } catch (error) { return error.message; } };
            return eval(call);
        }""",
        [module, call],
    )
    assert found == expected


@pytest.fixture(scope="module")
def decided(server: Stage, browser: Browser) -> Iterator[Page]:
    """A page that has the modules."""
    with tab(browser, server.ops, bypass_csp=True) as opened:
        yield opened.open("/ui/playground?model=iris")


# For everyone


@pytest.mark.parametrize("model", ["assistant@1&with=assistant@2", "painter", "iris", "bright"])
def test_it_works_at_the_width_of_a_phone(seen: Tab, model: str) -> None:
    seen.page.set_viewport_size({"width": PHONE["width"], "height": PHONE["height"]})
    page = seen.open(f"/ui/playground?model={model}")
    expect(page.get_by_role("button", name="Copy as code")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
