"""`GET /admin/replicas` of a real server: what there is, now."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.servers import IDENTITY, Serving, serving, write_model

SECONDS = 60.0


def shown(server: Serving) -> dict[str, Any]:
    status, body = server.get("/admin/replicas", url=server.ops)
    assert status == 200
    assert isinstance(body, dict)
    return body


def replica(server: Serving, model: str, instance: int = 0) -> dict[str, Any]:
    (found,) = (each for each in shown(server)["replicas"] if (each["model"], each["instance"]) == (model, instance))
    assert isinstance(found, dict)
    return found


def until(there: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := there()):
        assert time.monotonic() < deadline
        time.sleep(0.05)  # between looks at another process's doings
    return found


def test_replicas_their_processes_and_the_servers_own_are_shown(tmp_path: Path) -> None:
    write_model(tmp_path, "inline", IDENTITY)
    write_model(tmp_path, "apart", IDENTITY, spec="instances: {isolation: process, count: 2}\n")
    with serving(tmp_path) as server:
        server.begin()

        def busy() -> dict[str, Any] | None:  # a processor's time is told in hundredths of a second
            assert all(server.infer("apart", [1, 2, 3, 4])[0] == 200 for _ in range(20))
            found = replica(server, "apart")
            return found if found["cpu_seconds"] else None

        apart = until(busy)
        assert (apart["kind"], apart["state"], apart["restarts"], apart["device"]) == ("process", "ready", 0, "cpu")
        assert apart["rss_bytes"] > 0
        inline = replica(server, "inline")
        assert (inline["kind"], inline["pid"], inline["rss_bytes"]) == ("inline", None, 0)
        process = shown(server)["process"]
        assert process["pid"] == server.process.pid and process["rss_bytes"] > 0 and process["uptime_seconds"] > 0
        assert shown(server)["devices"] == []

        os.kill(apart["pid"], signal.SIGKILL)
        again = until(
            lambda: (found := replica(server, "apart"))["restarts"] and found["state"] == "ready" and found["rss_bytes"] and found
        )
        assert again["pid"] not in (None, apart["pid"])
        assert again["cpu_seconds"] >= apart["cpu_seconds"]  # what it used before it died stays counted
        text = server.get("/metrics", url=server.ops)[1]
        assert 'fairlead_replicas{model="apart",state="ready",version="1"} 2.0' in text
        assert 'fairlead_instance_restarts_total{model="apart",version="1"} 1.0' in text
        assert server.get("/admin/replicas?x=1", url=server.ops)[0] == 400
