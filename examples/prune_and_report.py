"""
Prune a store and report its state in one line: for cron, which mails errors. See README.md.

It attaches to the running store and never starts one. A store prunes itself once a minute; use this for a store with
`check_period=None`, to prune at a chosen hour, and for the report.
"""

from __future__ import annotations

import sys
from datetime import datetime

import shmstore


def main(name: str) -> None:
    """Prune and report the store of this name."""
    try:
        with shmstore.connect(name) as store:
            pruned = store.prune()
            stats = store.stats()
    except shmstore.ShmStoreError as exc:
        sys.exit(str(exc))
    print(
        f"{datetime.now():%F %T} store {name}: {pruned} pruned, {stats.sessions} sessions, {stats.owned} logged in, "
        f"{stats.bytes / stats.memory:.0%} of its memory, {stats.evicted_owned} ever logged out for want of room"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("which store? python prune_and_report.py NAME")
    main(sys.argv[1])
