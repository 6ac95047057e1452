"""Those who use a server while versions come and go: clients that ask without a pause, and whoever administers it."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from msgspec import Struct

Found = TypeVar("Found")

SECONDS = 30.0
"""Long enough for anything that happens at all."""


def until(look: Callable[[], Found], what: str = "it") -> Found:
    """The first of its values that is true."""
    deadline = time.monotonic() + SECONDS
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.02)  # between looks at another process's doings
    return found


class Answer(Struct, frozen=True):
    """What one client saw."""

    sent: float
    row: int
    """Of what was asked."""
    session: str
    status: int
    version: str = ""
    id: str = ""
    outputs: tuple[list[float], ...] = ()
    error: str = ""


class Clients:
    """Each in a thread, on a connection of its own, one request after the other."""

    def __init__(self, url: str, model: str, rows: np.ndarray, num: int, sessions: int) -> None:
        """`sessions`: each request names one of so many; 0: none."""
        self.url = urlsplit(url)
        self.model = model
        self.sessions = sessions
        self.bodies = [
            json.dumps({"inputs": [{"name": "x", "shape": [1, len(row)], "datatype": "FP32", "data": row.tolist()}]}) for row in rows
        ]
        self.answers: list[Answer] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(n, num)) for n in range(num)]

    def _ask_on(self, n: int, num: int) -> None:
        connection = http.client.HTTPConnection(self.url.hostname or "", self.url.port, timeout=30)
        try:
            while not self._stop.is_set():
                self.answers.append(self.ask(connection, n))
                n += num
        finally:
            connection.close()

    def ask(self, connection: http.client.HTTPConnection, n: int) -> Answer:
        row, sent = n % len(self.bodies), time.time()
        session = f"session-{n % self.sessions}" if self.sessions else ""
        headers = {"content-type": "application/json", **({"x-fairlead-session": session} if session else {})}
        try:
            connection.request("POST", f"/v2/models/{self.model}/infer", self.bodies[row], headers)
            with connection.getresponse() as response:
                status, id, content = response.status, response.headers["x-request-id"], response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return Answer(sent, row, session, 0, error=repr(error))
        if status != 200:
            return Answer(sent, row, session, status, id=id, error=content.decode())
        told = json.loads(content)
        return Answer(sent, row, session, status, told["model_version"], id, tuple(each["data"] for each in told["outputs"]))

    @property
    def failed(self) -> list[Answer]:
        return [each for each in self.answers if each.status != 200]

    @property
    def versions(self) -> set[str]:
        return {each.version for each in self.answers if each.version}

    @property
    def last(self) -> Answer:
        """Of what was sent last."""
        return max(self.answers, key=lambda each: each.sent)

    def sides(self) -> dict[str, str]:
        """Session → the version that answered it last."""
        return {each.session: each.version for each in self.answers if each.version}

    def answered(self, more: int) -> None:
        """Wait until there were so many more."""
        goal = len(self.answers) + more
        until(lambda: len(self.answers) >= goal, f"{more} more answers")


@contextmanager
def clients(url: str, model: str, rows: np.ndarray, num: int = 2, sessions: int = 0) -> Iterator[Clients]:
    asking = Clients(url, model, rows, num, sessions)
    for thread in asking._threads:
        thread.start()
    try:
        yield asking
    finally:
        asking._stop.set()
        for thread in asking._threads:
            thread.join(60)


class Admin:
    """Over HTTP, on one server's operations port."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, method: str, path: str, value: Any = None) -> tuple[int, Any]:
        at = urlsplit(self.url)
        connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=60)
        try:
            connection.request(method, path, None if value is None else json.dumps(value), {"content-type": "application/json"})
            with connection.getresponse() as response:
                return response.status, json.loads(response.read())
        finally:
            connection.close()

    def told(self, method: str, path: str, value: Any = None) -> Any:
        status, answer = self.ask(method, path, value)
        assert status < 400, answer
        return answer

    def add(self, model: str, uri: object) -> int:
        return int(self.told("POST", f"/admin/models/{model}/versions", {"uri": str(uri)})["version"]["version"])

    def start(self, *candidates: str, **wish: Any) -> str:
        """The id of a rollout."""
        return str(self.told("POST", "/admin/rollouts", {"candidates": candidates, **wish})["id"])

    def rollout(self, id: str) -> Any:
        return self.told("GET", f"/admin/rollouts/{id}")

    def wait(self, id: str, *phases: str) -> Any:
        told: Any = None

        def look() -> bool:
            nonlocal told
            told = self.rollout(id)
            assert told["phase"] in phases or told["phase"] not in ("aborted", "complete"), told["reason"]
            return told["phase"] in phases

        until(look, f"{phases} of {id}")
        return told

    def serve(self, model: str, uri: object) -> int:
        """A version that takes all of the traffic at once."""
        number = self.add(model, uri)
        self.wait(self.start(f"{model}@{number}", policy="at-once"), "complete")
        return number

    def version(self, model: str, number: int) -> Any:
        return self.told("GET", f"/admin/models/{model}/versions/{number}")

    def deployment(self, model: str) -> Any:
        found = self.told("GET", "/admin/deployments")["deployments"]
        return next((each for each in found if each["model"] == model), None)


def right(answers: Sequence[Answer], labels: np.ndarray) -> list[bool]:
    """Whether each names the class that is right."""
    return [int(np.argmax(each.outputs[0])) == int(labels[each.row]) for each in answers]
