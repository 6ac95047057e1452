"""Who waits for news of a job hears of it, and of no other."""

from fairlead.jobs.changes import Changes


async def test_each_listener_of_a_job_hears_of_its_changes() -> None:
    changes = Changes()
    with changes.listen("a") as first, changes.listen("a") as second, changes.listen("b") as other:
        changes.tell("a")
        assert first.is_set() and second.is_set() and not other.is_set()
        first.clear()
        changes.tell_all()
        assert first.is_set() and other.is_set()


async def test_nobody_is_kept_who_does_not_listen_any_longer() -> None:
    changes = Changes()
    with changes.listen("a") as left:
        with changes.listen("a") as gone:
            pass
        changes.tell("a")
        assert left.is_set() and not gone.is_set()
    changes.tell("a")
    assert changes._waiting == {}
