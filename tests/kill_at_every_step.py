"""Run one operation in a child that is killed at its first step, at its second, ... until it completes.

A process of its own, because forking needs one without threads: `python kill_at_every_step.py SITUATION`.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback

import fault_injection as faults


def main() -> None:
    situation = next(each for each in faults.SITUATIONS if each.name == sys.argv[1])
    before, after, steps = faults.outcome(situation)
    for chosen in range(1, steps + 2):
        with situation.store() as store:
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
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status)
            assert killed == (chosen <= steps), f"step {chosen} of {steps}: status {status}"
            try:
                faults.verify(store, before, after, atomic=situation.atomic)
            except BaseException:
                print(f"killed at step {chosen} of {steps}")
                raise
    print(f"{steps} steps")


if __name__ == "__main__":
    main()
