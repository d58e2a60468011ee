"""`make peers` accepts documented failures only, and only while they fail."""

from __future__ import annotations

import peers
import pytest
from distributions import Outcome

REASONS = {"test_signature": "is about signed cookies"}


@pytest.mark.parametrize(
    ("passed", "failed", "good", "line"),
    [
        (2, ["test_signature", "test_signature"], True, "2 passed, 0 failed, 2 failed for a documented reason"),
        (2, ["test_signature", "test_login"], False, "test_login: FAILED"),
        (2, [], False, "test_signature: DID NOT FAIL, but is documented: is about signed cookies"),
        (0, ["test_signature"], False, "0 passed"),
    ],
)
def test_verdict(passed: int, failed: list[str], good: bool, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.report("flask-3", REASONS, Outcome(passed, 0, failed, "what pytest printed")) is good
    printed = capsys.readouterr().out
    assert line in printed
    assert ("what pytest printed" in printed) is not good


def test_too_few_tests(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome(2, 0, [], "what pytest printed")
    assert peers.report("flask-3", {}, outcome, 2)
    assert not peers.report("flask-3", {}, outcome, 3)
    assert "3 must pass" in capsys.readouterr().out


def test_a_project_that_ships_no_tests(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.report("flask_session-0.8", {}, "has no tests in its sdist")
    assert "has no tests" in capsys.readouterr().out
