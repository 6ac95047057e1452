"""Versions that are bad in every way, through a whole server with traffic on it: who asks sees nothing of them, or as little as was allowed."""

import concurrent.futures
import io
import json
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fairlead.cli import cli
from fairlead.control.checks import AccuracyRule, LatencyRule, MemoryRule, Rules
from tests.cli.traffic import Admin, clients, right, until
from tests.control.flowers import Iris
from tests.servers import Serving, serving
from tests.store.postgres import private_postgres

CONFIG = """
store: {{url: "{store}"}}
logs: {{requests: false}}
control:
  tick_seconds: 0.2
  lease_seconds: 1.0
  registry: {registry}
  policies:
    at-once: {{steps: [], validate: false, rollback_seconds: 0}}
    careful: {{steps: [{{share: 0.5, seconds: 0.5, min_requests: 10}}], interval: 0.5, metrics: [], rollback_seconds: 0}}
    two-steps:
      steps: [{{share: 0.3, seconds: 0.5, min_requests: 10, hold: true}}, {{share: 0.6, seconds: 0.5, min_requests: 10}}]
      interval: 0.5
      metrics: [{{name: error_rate}}]
      validate: false
      rollback_seconds: 0
    quick-answers:
      {{steps: [{{share: 0.5, seconds: 3600}}], interval: 0.5, metrics: [{{name: latency_p50, tolerance: 1.0}}], validate: false}}
    right-answers:
      {{steps: [{{share: 0.5, seconds: 3600}}], interval: 0.5, metrics: [{{name: "feedback:right"}}], validate: false}}
    alike: {{steps: [{{shadow: 1.0, seconds: 1, min_requests: 50}}], interval: 0.5, metrics: [], validate: false}}
"""


def config(folder: Path, store: str = "", **registry: object) -> Path:
    file = folder / "fairlead.yaml"
    url = {"url": str(folder / "registry")}
    file.write_text(CONFIG.format(store=store or f"sqlite:///{folder}/fairlead.db", registry=json.dumps(url | registry)))
    (folder / "none").mkdir(exist_ok=True)
    return file


@pytest.fixture(scope="module")
def iris(tmp_path_factory: pytest.TempPathFactory) -> Iris:
    return Iris(tmp_path_factory.mktemp("iris"))


class Flowers:
    """Sources of versions."""

    def __init__(self, iris: Iris, folder: Path) -> None:
        self.iris = iris
        self.folder = folder
        self._num = 0

    def source(self, fault: str = "", *, notes: str = "", **parameters: str) -> Path:
        self._num += 1
        folder = self.folder / f"source-{self._num}"
        (folder / "1").mkdir(parents=True)
        for file in ("model.py", "weights.npz"):
            (folder / "1" / file).write_bytes((Path(self.iris.folder) / file).read_bytes())
        spec = {"instances": {"isolation": "thread"}, "parameters": {"fault": fault, "notes": notes, **parameters}}
        (folder / "model.yaml").write_text(json.dumps(spec))
        return folder


@pytest.fixture
def flowers(iris: Iris, tmp_path: Path) -> Flowers:
    return Flowers(iris, tmp_path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("server")
    with serving(folder / "none", "--config", config(folder)) as running:
        yield running.begin()


@pytest.fixture
def admin(server: Serving) -> Admin:
    return Admin(server.ops)


def command(admin: Admin, *arguments: object, code: int = 0) -> str:
    """What a command of ours says, in this process."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--url", admin.url])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


# What gates find


@pytest.fixture(scope="module")
def garden(server: Serving, iris: Iris, tmp_path_factory: pytest.TempPathFactory) -> Flowers:
    """A model whose champion was validated, so that others are held against it."""
    flowers, admin = Flowers(iris, tmp_path_factory.mktemp("garden")), Admin(server.ops)
    admin.add("garden", flowers.source())
    admin.wait(admin.start("garden@1", policy="careful"), "complete")
    return flowers


@pytest.mark.parametrize(
    ("fault", "rules", "reason"),
    [
        ("hangs on load", Rules(load_seconds=3.0), "load: it did not end within 3 s, and was ended"),
        ("leaks", Rules(memory=MemoryRule(requests=300, growth_bytes=8 << 20)), "memory: "),
        ("slow under load", Rules(latency=LatencyRule(p50=0.1, requests=100, concurrency=16)), "latency: with 16 requests under way"),
        ("wrong for one class", Rules(accuracy=AccuracyRule(floor=0.5, margin=None)), "of class '1'"),
        ("flipped", Rules(), "output 'scores' is gone"),
    ],
)
def test_a_version_that_does_not_pass_its_gates_answers_nobody(
    server: Serving, admin: Admin, garden: Flowers, tmp_path: Path, fault: str, rules: Rules, reason: str
) -> None:
    admin.told("PUT", "/admin/models/garden/checks", garden.iris.checks(rules, num_golden=0).to_json())
    number = admin.add("garden", garden.source(fault, pids=str(tmp_path / "pids")))
    with clients(server.http, "garden", garden.iris.x, num=1) as asking:
        ended = admin.wait(admin.start(f"garden@{number}", policy="careful"), "aborted")
        asking.answered(10)

    assert reason in ended["reason"]
    assert (asking.versions, asking.failed) == ({"1"}, [])
    assert admin.version("garden", number)["stage"] == "rejected"
    failed = [each["gate"] for each in admin.version("garden", number)["gates"] if each["outcome"] == "failed"]
    assert failed == [ended["reason"].removeprefix("did not pass its gates: ").partition(":")[0]]


def test_golden_requests_of_live_traffic_fail_a_version_that_answers_otherwise(server: Serving, admin: Admin, flowers: Flowers) -> None:
    admin.serve("golden", flowers.source())
    assert admin.told("POST", "/admin/models/golden/recording", {"requests": 15})["running"]
    with clients(server.http, "golden", flowers.iris.x, num=1):
        until(lambda: len(admin.told("GET", "/admin/models/golden/checks")["golden"]) == 15, "the recording")
    assert not admin.told("GET", "/admin/models/golden/recording")["running"]

    admin.add("golden", flowers.source("constant"))
    ended = admin.wait(admin.start("golden@2", policy="careful"), "aborted")
    assert "golden: 15 of 15 examples are answered otherwise" in ended["reason"]

    admin.add("golden", flowers.source(notes="the same in other words"))
    with clients(server.http, "golden", flowers.iris.x) as asking:
        admin.wait(admin.start("golden@3", policy="careful"), "complete")
        until(lambda: "3" in asking.versions)
    assert asking.failed == []


# What the registry finds


def test_a_version_whose_file_was_changed_after_it_was_added_is_not_loaded(server: Serving, admin: Admin, flowers: Flowers) -> None:
    admin.serve("spoiled", flowers.source())
    admin.add("spoiled", flowers.source(notes="second"))
    weights = Path(admin.version("spoiled", 2)["location"].removeprefix("file://")) / "weights.npz"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.chmod(0o600)
    weights.write_bytes(content)

    with clients(server.http, "spoiled", flowers.iris.x) as asking:
        for policy in ("careful", "two-steps"):  # found by the gates, and where there are none
            ended = admin.wait(admin.start("spoiled@2", policy=policy), "aborted")
            assert "spoiled@2 is not what was added: weights.npz has the digest" in ended["reason"]
    assert (asking.versions, asking.failed) == ({"1"}, [])
    assert admin.version("spoiled", 2)["stage"] == "rejected"


def test_what_is_pushed_twice_is_one_version_also_where_both_come_at_once(admin: Admin, flowers: Flowers) -> None:
    same, others = flowers.source(), [flowers.source(notes=str(n)) for n in range(3)]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(same, ".")

    def push(what: Path | bytes) -> Any:
        if isinstance(what, Path):
            return admin.told("POST", "/admin/models/pushed/versions", {"uri": str(what)})
        request = urllib.request.Request(admin.url + "/admin/models/pushed/versions", what, {"content-type": "application/x-tar"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        pushed = list(pool.map(push, [same, packed.getvalue(), same, packed.getvalue()]))
        assert [each["new"] for each in pushed].count(True) == 1
        assert len({each["version"]["version"] for each in pushed}) == 1
        different = list(pool.map(push, others))
    assert len({each["version"]["version"] for each in different}) == 3
    assert not push(same)["new"]
    assert len(admin.told("GET", "/admin/models/pushed/versions")["versions"]) == 4


# What traffic finds


def test_one_rollout_at_a_time_also_where_two_are_asked_for_at_once(server: Serving, admin: Admin, flowers: Flowers) -> None:
    admin.serve("busy", flowers.source())
    for n in range(2):
        admin.add("busy", flowers.source(notes=str(n)))
    start = threading.Barrier(2)

    def push_forward(number: int) -> tuple[int, Any]:
        start.wait()
        return admin.ask("POST", "/admin/rollouts", {"candidates": [f"busy@{number}"], "policy": "two-steps"})

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = dict(zip((2, 3), pool.map(push_forward, (2, 3)), strict=True))
    assert sorted(status for status, _ in answers.values()) == [200, 409]
    winner, (_, running) = next((number, answer) for number, answer in answers.items() if answer[0] == 200)
    loser = 5 - winner
    assert running["id"] in answers[loser][1]["detail"]

    admin.wait(running["id"], "progressing")
    for method, path, body in (
        ("POST", "/admin/rollouts", {"candidates": [f"busy@{loser}"], "kind": "shadow"}),
        ("PUT", "/admin/models/busy/aliases/champion", {"version": loser}),
        ("DELETE", "/admin/deployments/busy", None),
        ("DELETE", f"/admin/models/busy/versions/{winner}", None),
        ("POST", "/admin/models/busy/versions/1/retire", {}),
    ):
        status, problem = admin.ask(method, path, body)
        assert status == 409, (path, problem)
    assert admin.deployment("busy")["wanted"] | {"share": 0.3, "champion": 1, "candidate": winner} == admin.deployment("busy")["wanted"]
    admin.told("POST", "/admin/rollouts/busy/abort", {"reason": "enough"})
    admin.wait(admin.start(f"busy@{loser}", policy="at-once"), "complete")


def test_a_version_that_is_slow_only_under_load_loses_its_traffic(server: Serving, admin: Admin, flowers: Flowers) -> None:
    admin.serve("slow", flowers.source())
    admin.add("slow", flowers.source("slow under load"))
    with clients(server.http, "slow", flowers.iris.x, num=6) as asking:
        asking.answered(50)
        ended = admin.wait(admin.start("slow@2", policy="quick-answers"), "aborted")
        asking.answered(50)
    assert "latency_p50 is worse" in ended["reason"]
    assert (asking.failed, asking.last.version) == ([], "1")


def test_feedback_by_request_id_ends_the_rollout_of_a_version_that_is_wrong(server: Serving, admin: Admin, flowers: Flowers) -> None:
    """Users of one kind of flower complain: it is wrong for one class only, and its errors, its times and its shape are fine."""
    admin.serve("judged", flowers.source())
    admin.add("judged", flowers.source("wrong for one class"))
    rows = (flowers.iris.y != 1) | (flowers.iris.x[:, 2] > 4.0)
    x, y = flowers.iris.x[rows], flowers.iris.y[rows]
    id = admin.start("judged@2", policy="right-answers")
    admin.wait(id, "progressing")
    told, unknown, taken = 0, [], []
    with clients(server.http, "judged", x) as asking:

        def judge() -> Any:
            nonlocal told, unknown
            new, told = asking.answers[told : told + 800], min(len(asking.answers), told + 800)
            posts = [{"request_id": each.id, "name": "right", "label": is_right} for each, is_right in zip(new, right(new, y), strict=True)]
            posts = unknown + posts
            if posts:
                said = admin.told("POST", "/admin/feedback", {"feedback": posts[:1000]})["taken"]
                taken.extend(said)
                # not written yet: a request is known a moment after it was answered
                unknown = [post for post, word in zip(posts, said, strict=False) if word == "unknown"][-200:]
            rollout = admin.rollout(id)
            return rollout if rollout["phase"] == "aborted" else None

        ended = until(judge, "the end of the rollout")
        asking.answered(20)
    assert "feedback:right is worse" in ended["reason"]
    assert taken.count("taken") > 100
    assert asking.failed == []
    again = admin.told("POST", "/admin/feedback", {"feedback": [{"request_id": "nobody", "name": "right", "score": 1.0}]})
    assert again["taken"] == ["unknown"]


def test_an_experiment_says_what_it_finds_and_leaves_the_decision_to_people(server: Serving, admin: Admin, flowers: Flowers) -> None:
    admin.serve("tried", flowers.source())
    admin.add("tried", flowers.source(notes="other"))
    id = json.loads(command(admin, "rollout", "experiment", "tried@2", "--share", "0.4", "--policy", "right-answers", "--json"))["id"]
    with clients(server.http, "tried", flowers.iris.x, sessions=40) as asking:
        until(lambda: "2" in asking.versions)
        since = time.time()
        until(lambda: admin.rollout(id)["requests"] > 400)
    assert asking.failed == []
    told = admin.rollout(id)
    assert told["phase"] == "progressing" and 0.1 < told["exposure"] < 0.7
    sides: dict[str, set[str]] = {}
    for each in asking.answers:
        if each.sent > since:
            sides.setdefault(each.session, set()).add(each.version)
    assert set(map(len, sides.values())) == {1} and set().union(*sides.values()) == {"1", "2"}, "each session keeps its side"
    assert "experiment" in command(admin, "rollout", "report", id)
    assert "promoted" in command(admin, "rollout", "promote", id, "--reason", "it is liked")
    events = admin.told("GET", "/admin/models/tried/events")["entries"]
    assert any(each["action"] == "rollout.promote" and each["details"]["reason"] == "it is liked" for each in events)


def test_a_shadow_shows_where_it_disagrees_and_answers_nobody(server: Serving, admin: Admin, flowers: Flowers) -> None:
    admin.serve("copied", flowers.source())
    admin.add("copied", flowers.source("wrong for one class"))
    id = json.loads(command(admin, "rollout", "shadow", "copied@2", "--policy", "alike", "--share", "1.0", "--json"))["id"]
    with clients(server.http, "copied", flowers.iris.x, num=1) as asking:
        ended = admin.wait(id, "complete")
    assert "its outputs are others" in ended["reason"]
    assert (asking.versions, asking.failed) == ({"1"}, [])

    def decided() -> dict[str, Any] | None:
        """The whole one: it is written after the decision."""
        found = admin.told("GET", f"/admin/rollouts/{id}/report")["shadow"].get("copied")
        return found if found and found["decision"] == "disagree" else None

    report = until(decided, "the report")
    assert report["agree"] < report["pairs"]
    assert 1 <= len(report["worst"]) <= 20
    distances = [each["distance"] for each in report["worst"]]
    assert distances == sorted(distances, reverse=True)
    assert "worst disagreements" in command(admin, "rollout", "report", id)


def test_a_good_version_is_watched_until_it_serves(server: Serving, admin: Admin, flowers: Flowers) -> None:
    source = flowers.source()
    assert command(admin, "models", "add", source, "--name", "fine").strip() == "fine@1"
    command(admin, "rollout", "start", "fine@1", "--policy", "at-once", "--watch")
    command(admin, "models", "add", flowers.source(notes="better"), "--name", "fine", "--metric", "accuracy=0.97")
    with clients(server.http, "fine", flowers.iris.x) as asking:
        said = command(admin, "rollout", "start", "fine@2", "--policy", "careful", "--watch").splitlines()
        asking.answered(10)
    assert said[0] == "fine@2 validating" and said[-1].startswith("fine@2 complete 100%")
    told = json.loads(command(admin, "rollout", "show", "fine", "--json"))
    assert [each["share"] for each in told["history"] if each["phase"] == "progressing"] == [0.5]
    assert (asking.failed, asking.last.version) == ([], "2")
    assert "accuracy" in command(admin, "models", "diff", "fine@1", "fine@2")
    assert command(admin, "rollout", "watch", "fine", "--exit", "--json", code=0)


# What becomes of it when something else breaks


def key_pair(folder: Path) -> tuple[Path, str]:
    """The private key's file, the public key."""
    key = Ed25519PrivateKey.generate()
    file = folder / "key.pem"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return file, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def test_a_server_that_is_killed_in_mid_rollout_comes_back_with_the_same_shares_and_goes_on(flowers: Flowers, tmp_path: Path) -> None:
    """One that lets only signed versions serve, before and after."""
    key, public = key_pair(tmp_path)
    file = config(tmp_path, signed_only=True, trusted_keys={"release": public})
    with serving(tmp_path / "none", "--config", file) as server:
        admin = Admin(server.begin().ops)
        for source in (flowers.source(), flowers.source(notes="second")):
            command(admin, "models", "add", source, "--name", "iris", "--sign", key)
        admin.wait(admin.start("iris@1", policy="at-once"), "complete")
        assert admin.add("iris", flowers.source(notes="whose?")) == 3
        status, problem = admin.ask("POST", "/admin/rollouts", {"candidates": ["iris@3"]})
        assert status == 409 and "signed" in problem["detail"], problem

        id = admin.start("iris@2", policy="two-steps")
        with clients(server.http, "iris", flowers.iris.x, sessions=40) as asking:
            admin.wait(id, "paused")
            asking.answered(80)
        assert asking.failed == [] and asking.versions == {"1", "2"}
        sides, counted = asking.sides(), admin.rollout(id)["candidate_requests"]
        assert counted >= 10
        server.process.kill()
        server.process.wait(30)

    with serving(tmp_path / "none", "--config", file) as server:
        admin = Admin(server.begin().ops)
        with clients(server.http, "iris", flowers.iris.x, sessions=40) as asking:
            asking.answered(80)
            until(lambda: asking.versions == {"1", "2"}, "both versions are there again")
            asking.answered(80)
            latest = dict(asking.sides())
            told = admin.rollout(id)
            assert (told["phase"], told["step"], told["share"]) == ("paused", 1, 0.3)
            assert told["candidate_requests"] >= counted
            assert latest == sides, "every session is where it was"
            admin.told("POST", f"/admin/rollouts/{id}/resume")
            admin.wait(id, "complete")
            asking.answered(20)
        assert (asking.failed, asking.last.version) == ([], "2")
        assert admin.version("iris", 2)["stage"] == "serving"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Any]:
    with private_postgres() as running:
        yield running


def who_decides(admin: Admin, one: Serving, two: Serving) -> tuple[Serving, Serving]:
    """That server, and the other one."""
    leader = until(lambda: admin.told("GET", "/admin/deployments")["leader"], "that somebody decides")
    return (one, two) if leader.split("-")[-2] == str(one.process.pid) else (two, one)


def test_servers_follow_within_a_second_and_go_on_where_the_one_that_decides_is_killed(
    flowers: Flowers, tmp_path: Path, postgres: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, store=postgres.new_database())
    with serving(tmp_path / "none", "--config", file) as one, serving(tmp_path / "none", "--config", file) as two:
        admin, x = Admin(one.begin().ops), flowers.iris.x
        two.begin()
        admin.serve("iris", flowers.source())
        for notes in ("second", "third"):
            admin.add("iris", flowers.source(notes=notes))

        with clients(one.http, "iris", x, num=1) as ones, clients(two.http, "iris", x, num=1) as twos:
            id = admin.start("iris@2", policy="two-steps")
            admin.wait(id, "paused")
            until(lambda: "2" in ones.versions & twos.versions, "traffic of both servers")
            decides, follows = who_decides(admin, one, two)
            following = twos if follows is two else ones
            asked = time.time()
            Admin(decides.ops).told("POST", f"/admin/rollouts/{id}/abort", {"reason": "to see how fast"})
            answered = time.time()
            until(lambda: all(each.version == "1" for each in following.answers[-50:]))
            until(lambda: all(each.version == "1" for each in [*ones.answers[-50:], *twos.answers[-50:]]))
        assert ones.failed == twos.failed == []
        late = max(each.sent for each in following.answers if each.version == "2") - asked
        with capsys.disabled():
            print(f" [last sent to it {1e3 * late:.0f} ms after it was asked to go, answered in {1e3 * (answered - asked):.0f} ms]", end="")

        id = admin.start("iris@3", policy="two-steps")
        with clients(one.http, "iris", x, num=1), clients(two.http, "iris", x, num=1):
            admin.wait(id, "paused")
        decides, follows = who_decides(admin, one, two)
        admin = Admin(follows.ops)
        with clients(follows.http, "iris", x) as asking:
            asking.answered(20)
            decides.process.kill()
            decides.process.wait(30)
            until(lambda: who_decides(admin, one, two)[0] is follows, "that the other one takes over")
            assert admin.rollout(id)["phase"] == "paused"
            asking.answered(100)
            assert {each.version for each in asking.answers[-100:]} == {"1", "3"}
            admin.told("POST", f"/admin/rollouts/{id}/resume")
            admin.wait(id, "complete")
            asking.answered(20)
        assert (asking.failed, asking.last.version) == ([], "3")


def said(server: Serving, event: str) -> bool:
    """In its log, until now."""
    return any(f'"event":"{event}"' in line for line in tuple(server.said))


def test_without_its_database_a_server_goes_on_and_still_takes_traffic_from_what_breaks(
    flowers: Flowers, tmp_path: Path, postgres: Any
) -> None:
    giants = 1000 * flowers.iris.x
    with serving(tmp_path / "none", "--config", config(tmp_path, store=postgres.new_database())) as server:
        admin = Admin(server.begin().ops)
        admin.serve("iris", flowers.source())
        admin.add("iris", flowers.source("fails for giants"))
        id = admin.start("iris@2", policy="two-steps")
        with clients(server.http, "iris", flowers.iris.x) as asking:
            admin.wait(id, "paused")
            postgres.stop()
            try:
                until(lambda: said(server, "control_store_gone"), "that it is noticed")
                asking.answered(200)
                assert {each.version for each in asking.answers[-100:]} == {"1", "2"}, "as it was published last"
                status, told = admin.ask("GET", "/admin/deployments")
                assert (status, told["leader"]) == (200, "") and "the store does not answer" in told["store_error"], told
                (iris,) = told["deployments"]
                assert (iris["wanted"]["champion"], iris["wanted"]["candidate"], iris["wanted"]["share"]) == (1, 2, 0.3)
                result = CliRunner().invoke(cli, ["rollout", "deployments", "--url", admin.url])
                assert result.exit_code == 0 and "control cannot reach the store" in result.stderr
                assert admin.ask("POST", f"/admin/rollouts/{id}/resume")[0] == 503
                assert asking.failed == []
                with clients(server.http, "iris", giants, num=6) as unlucky:
                    until(lambda: said(server, "rollout_abort"), "that the candidate is taken back")
                    unlucky.answered(50)
                    assert {each.version for each in unlucky.answers[-20:]} == {"1"}
            finally:
                postgres.start()
            until(lambda: said(server, "control_store_back"), "that it is back")
            ended = admin.wait(id, "aborted")
            asking.answered(20)
        assert "are errors" in ended["reason"]
        assert asking.failed == []
        assert {each.version or "2" for each in unlucky.failed} == {"2"}
        assert admin.version("iris", 2)["stage"] == "rejected"
        assert admin.told("GET", "/admin/deployments")["store_error"] == ""
        assert admin.deployment("iris")["wanted"] == {"champion": 1}
