"""How long a session lives: the ttl rule, and deadlines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from shmstore.engine.header import BY_FUNCTION, NEVER
from shmstore.options import Duration, Options, seconds
from shmstore.system.clock import NS

DAY: Final = 86_400.0
_LONGEST: Final = NEVER / NS


def nanoseconds(life: Duration) -> int:
    """Return a duration as it stands in a cell: nothing below zero, `NEVER` for what is too long to count."""
    life = seconds(life)
    return 0 if life <= 0 else int(life * NS) if life < _LONGEST else NEVER


def deadline(now: int, span: int) -> int:
    """
    Return the first instant at which a session that lives for ``span`` nanoseconds from ``now`` on is expired.

    At exactly its age it is alive; with no life at all it is expired at once.
    """
    return min(now + span + 1, NEVER) if span else 0


def life_of(options: Options, live: int, session: Mapping[Any, Any], sid: str) -> Duration:
    """
    Return the life of a session by the rule: the option ``ttl``, else its cookie's ``max_age``, else one day.

    Args:
        options: A function among them runs here, in the process that makes the call.
        live: The cell `TTL`, the same for all processes at any time.
        session: The session.
        sid: Its id.

    Raises:
        TypeError, ValueError: The function returned something that is no duration.
    """
    if live == BY_FUNCTION and options.ttl is not None:
        # Not a function: the new rule cannot be read in this process, which goes on by the one before.
        life = options.ttl(options, session, sid) if callable(options.ttl) else options.ttl
        return seconds(life, "the result of ttl")
    if live < BY_FUNCTION:
        return math.inf if live >= NEVER else live / NS
    cookie = session.get("cookie")
    age = cookie.get("max_age") if isinstance(cookie, Mapping) else None
    if isinstance(age, (int, float)) and not isinstance(age, bool) and age == age:  # NaN is not
        return age
    return DAY
