"""Commands as a user types them, except that scripts of Python are forks of a process that has imported everything."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from forks import Forked, Forker
from processes import ROOT, marked, wait_for

BIN = Path(sys.executable).parent
# A command without shell syntax other than quotes and a comment.
_ALONE = re.compile(r"""('[^']*'|[^'"\\$`|&;<>(){}*?#~\n]| #[^\n]*$)*""")


def words_of(command: str) -> list[str]:
    """Return the words of a command; those that run it by a shell if it needs one."""
    return shlex.split(command, comments=True) if _ALONE.fullmatch(command) else ["bash", "-c", command]


class Shell:
    """
    Runs commands in a directory; their processes are found and ended together.

    Attributes:
        environ: The environment of the commands.
    """

    def __init__(self, place: Path, forker: Forker, **environ: str) -> None:
        self._forker = forker
        self._processes: list[subprocess.Popen[bytes] | Forked] = []
        self._mark = f"SHMSTORE_TEST_PLACE={place}"
        name, _, value = self._mark.partition("=")
        path = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])
        self.environ = os.environ | {"PYTHONPATH": ROOT, "PATH": path, name: value, **environ}

    def start(self, words: Sequence[str], directory: Path, output: IO[bytes]) -> subprocess.Popen[bytes] | Forked:
        """Start a command in a session of its own, without input; variables may stand before it."""
        words, environ = [*words], dict(self.environ)
        while assigned := re.fullmatch(r"env|(\w+)=(.*)", words[0]):
            if assigned[1]:
                environ[assigned[1]] = assigned[2]
            del words[0]
        script = BIN / words[0]
        is_script = script.is_file() and re.match(rb"#!\S*python", script.read_bytes())
        if is_script or (words[0] == "python" and words[1].endswith(".py")):
            command = [str(script), *words[1:]] if is_script else words[1:]
            process: subprocess.Popen[bytes] | Forked = self._forker.script(command, output, directory, environ)
        else:
            process = subprocess.Popen(
                ["bash", "-c", shlex.join(words)], cwd=directory, env=environ, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def members(self) -> set[int]:
        """Return all running processes of the commands, and those that they started."""
        forks = (process for process in self._processes if isinstance(process, Forked))
        return marked(self._mark).union(*(forked.descendants() for forked in forks))

    def kill(self) -> None:
        def ended() -> bool:
            members = self.members()
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not members

        wait_for(ended, "the end of all")
        for process in self._processes:
            process.wait(60)
            if isinstance(process, Forked):
                process.close()
