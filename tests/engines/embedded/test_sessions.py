"""Who is waited for."""

from skyrl_train.engines.embedded.sessions import Sessions


def test_a_session_is_waited_for_between_its_requests():
    sessions = Sessions()
    sessions.open(["a", "b"])
    assert sessions.absent == {"a", "b"}
    sessions.came("a")
    sessions.came("b")
    assert sessions.absent == set()
    sessions.went("a")
    assert sessions.absent == {"a"}
    sessions.close(["a"])
    assert sessions.absent == set()


def test_closed_while_its_request_runs():
    sessions = Sessions()
    sessions.open(["a"])
    sessions.came("a")
    sessions.close(["a"])
    sessions.went("a")
    assert sessions.absent == set()


def test_two_requests_of_one_session():
    sessions = Sessions()
    sessions.open(["a"])
    sessions.came("a")
    sessions.came("a")
    sessions.went("a")
    assert sessions.absent == set()
    sessions.went("a")
    assert sessions.absent == {"a"}


def test_unannounced_sessions_and_none_are_never_waited_for():
    sessions = Sessions()
    for session in ("a", None):
        sessions.came(session)
        sessions.went(session)
    sessions.close(["unknown"])
    assert sessions.absent == set()


def test_opened_after_its_first_request():
    sessions = Sessions()
    sessions.came("a")
    sessions.open(["a"])
    assert sessions.absent == set()
    sessions.went("a")
    assert sessions.absent == {"a"}
