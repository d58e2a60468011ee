"""Run operations in children that are killed at a step, and check that they leave the same memory as the replay.

A process of its own, because forking needs one without threads: `python kill_at_every_step.py SEED COUNT [SITUATION]`.
COUNT is the number of random steps of each situation; 0: every step.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback

import fault_injection as faults
from fault_injection import Noting, Situation

from shmstore.store.store import Store


def killed(situation: Situation, store: Store, chosen: int) -> int:
    """Run the operation in a child that is killed at a step; return its pid, 0 if it has no such step."""
    child = os.fork()
    if not child:
        try:
            kill = faults.Steps(chosen, lambda: os.kill(os.getpid(), signal.SIGKILL))
            with faults.stepping(store.arena, kill):
                situation.operation(store)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"status {status}"
    return child if status else 0


def is_replayed(store: Store, child: int, replayed: bytes) -> bool:
    """Compare what the child left with what this process did. Where that has its own pid, the child left its pid."""
    left = faults.image(store.arena.file.memory)
    mine = os.getpid()
    pairs = zip(memoryview(left).cast("Q"), memoryview(replayed).cast("Q"), strict=True)
    return all(there == here or (there == child and here == mine) for there, here in pairs)


def at_steps(situation: Situation, count: int, rnd: random.Random) -> int:
    before, after, steps = faults.outcome(situation)
    moments = faults.moments(situation)
    assert len(moments) == steps
    chosen_steps = range(1, steps + 1)
    for chosen in rnd.sample(chosen_steps, min(count, steps)) if count else chosen_steps:
        try:
            with situation.store() as store:
                child = killed(situation, store, chosen)
                assert child
                replayed = moments[chosen - 1]
                assert is_replayed(store, child, replayed.memory), "the child left something else"
                if isinstance(dispose := store.options.dispose, Noting):
                    assert dispose.noted() == replayed.noted
                faults.check_outcome(store, before, after, atomic=situation.atomic)
        except BaseException:
            print(f"{situation.name}: killed at step {chosen} of {steps}")
            raise
    with situation.store() as store:
        assert not killed(situation, store, steps + 1)
        faults.check_outcome(store, after, after, atomic=situation.atomic)
    return min(count or steps, steps)


def main() -> None:
    seed, count, *names = sys.argv[1:]
    rnd = random.Random(seed)
    kills = [at_steps(each, int(count), rnd) for each in faults.SITUATIONS if each.name in names or not names]
    print(f"{sum(kills)} kills")


if __name__ == "__main__":
    main()
