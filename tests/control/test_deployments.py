"""What is wanted of a model becomes traffic only as far as it is loaded."""

from fairlead.control.deployments import Deployment, plan
from fairlead.core.routes import Routes

NOTHING = Routes()


def test_a_candidate_gets_its_share_once_it_is_loaded():
    wanted = {"fraud": Deployment(champion=6, candidate=7, share=0.05)}
    first = plan(wanted, {"fraud": (6,)}, NOTHING)
    assert first.load == (("fraud", 7),)
    assert first.routes.shares == {"fraud": (("6", 1.0),)}
    then = plan(wanted, {"fraud": (6, 7)}, first.routes)
    assert then.load == ()
    assert then.routes.shares == {"fraud": (("6", 0.95), ("7", 0.05))}


def test_a_candidate_is_not_loaded_before_its_champion_so_that_it_never_answers_alone():
    found = plan({"fraud": Deployment(champion=6, candidate=7, share=0.05)}, {}, NOTHING)
    assert found.load == (("fraud", 6),)
    assert found.routes.shares == {}


def test_the_old_version_serves_until_the_new_one_is_there():
    before = plan({"fraud": Deployment(champion=6)}, {"fraud": (6,)}, NOTHING).routes
    direct = {"fraud": Deployment(champion=7, keep=(6,))}
    meanwhile = plan(direct, {"fraud": (6,)}, before)
    assert meanwhile.routes.shares == {"fraud": (("6", 1.0),)}
    assert meanwhile.load == (("fraud", 7),)
    after = plan(direct, {"fraud": (6, 7)}, meanwhile.routes)
    assert after.routes.shares == {"fraud": (("7", 1.0),)}
    assert after.release == ()


def test_what_answers_is_not_released_although_nobody_wants_it_any_more():
    before = plan({"fraud": Deployment(champion=6)}, {"fraud": (6,)}, NOTHING).routes
    without = {"fraud": Deployment(champion=7)}
    meanwhile = plan(without, {"fraud": (6,)}, before)
    assert (meanwhile.routes.shares["fraud"], meanwhile.release) == ((("6", 1.0),), ())
    after = plan(without, {"fraud": (6, 7)}, meanwhile.routes)
    assert (after.routes.shares["fraud"], after.release) == ((("7", 1.0),), (("fraud", 6),))


def test_going_back_gives_everything_to_the_champion_and_releases_the_candidate():
    wanted = {"fraud": Deployment(champion=6, candidate=7, share=0.25)}
    during = plan(wanted, {"fraud": (6, 7)}, NOTHING)
    back = plan({"fraud": Deployment(champion=6)}, {"fraud": (6, 7)}, during.routes)
    assert back.routes.shares == {"fraud": (("6", 1.0),)}
    assert back.release == (("fraud", 7),)


def test_after_a_restart_a_kept_version_answers_while_the_champion_cannot():
    wanted = {"fraud": Deployment(champion=7, keep=(6,))}
    found = plan(wanted, {"fraud": (6,)}, NOTHING)
    assert found.routes.shares == {"fraud": (("6", 1.0),)}
    assert found.load == (("fraud", 7),)


def test_a_model_that_is_not_wanted_any_more_goes():
    found = plan({}, {"fraud": (6, 7)}, Routes(shares={"fraud": (("6", 1.0),)}))
    assert found.routes.shares == {}
    assert found.release == (("fraud", 6), ("fraud", 7))


def test_two_models_change_sides_in_one_snapshot():
    wanted = {"features": Deployment(champion=2, candidate=3, share=0.1), "fraud": Deployment(champion=6, candidate=7, share=0.1)}
    found = plan(wanted, {"features": (2, 3), "fraud": (6, 7)}, NOTHING)
    assert found.routes.shares == {"features": (("2", 0.9), ("3", 0.1)), "fraud": (("6", 0.9), ("7", 0.1))}
    assert found.routes.sticky == {"features": "session", "fraud": "session"}
