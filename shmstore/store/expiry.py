"""
The lifetime of a session: the ttl rule, and deadlines.

The session of a web request has a ttl of its own, which it passes to the store: `Policy.remaining_ttl`.
"""

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
    """Return a duration as the value of a cell: 0 if it is negative, `NEVER` if it exceeds the range."""
    if (type(life) is not float and type(life) is not int) or life != life:
        life = seconds(life)
    return 0 if life <= 0 else int(life * NS) if life < _LONGEST else NEVER


def deadline(now: int, span: int) -> int:
    """
    Return the first instant at which a session that lives for ``span`` nanoseconds from ``now`` on is expired.

    A session of exactly this age is alive. With a span of 0 it is expired at once.
    """
    return min(now + span + 1, NEVER) if span else 0


def life_of(options: Options, live: int, session: Mapping[Any, Any], sid: str) -> Duration:
    """
    Return the life of a session by the rule: the option ``ttl``, else its cookie's ``max_age``, else one day.

    Args:
        options: The options; a ``ttl`` function is called in this process.
        live: The cell `TTL`, the same for all processes at any time.
        session: The session.
        sid: Its id.

    Raises:
        TypeError, ValueError: The function returned something else than a duration.
    """
    if live == BY_FUNCTION and options.ttl is not None:
        # Not callable: this process cannot read the present rule, and keeps the previous one.
        life = options.ttl(options, session, sid) if callable(options.ttl) else options.ttl
        return seconds(life, "the result of ttl")
    if live < BY_FUNCTION:
        return math.inf if live >= NEVER else live / NS
    cookie = session.get("cookie")
    age = cookie.get("max_age") if isinstance(cookie, Mapping) else None
    if isinstance(age, (int, float)) and not isinstance(age, bool) and age == age:  # NaN is not
        return age
    return DAY
