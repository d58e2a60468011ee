"""`python make_arena.py layout-N.arena`: how the arena of each layout was made, with the last code that had it."""

from __future__ import annotations

import math
import sys

from shmstore.arena import Arena
from shmstore.layout import Geometry
from shmstore.options import Options
from shmstore.store import Store

now = 10**9  # a second after the boot, so that it is in the past of any test

arena = Arena.create(sys.argv[1], Geometry.plan(2**16))
with Store.over(arena, Options.of(memory=2**16, recency=0, clock=lambda: now)) as store:
    store.lay_down()
    for number in range(40):
        now += 10**6
        store.set(f"gap {number}", {"x": "y" * 50 * (number % 5)})
    for number in range(0, 40, 2):
        store.destroy(f"gap {number}")
    for number in range(12):
        now += 10**6
        ttl = math.inf if number % 2 else 10**9  # seconds
        store.set(f"s{number}", {"n": number, "x": "z" * 40 * number}, ttl, owner="ada" if number % 3 else None)
    store.set("long", {"x": "l" * 5000}, math.inf, owner="bob")  # in several runs: what is free is in pieces
    store.set("ünï", {"ö": ["ä", b"\0", (1, 2)]}, math.inf)
    store.set("expired", {}, 0)
    store.rename("s5", "renamed")
    for number in range(1, 40, 2):
        store.destroy(f"gap {number}")
    now += 10**6
    store.get("s3")
    store.arena.check()
