"""The command line, called in this process: a new process per call would take half a second."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from shmstore.cli import main
from shmstore.client import spawn

log = logging.getLogger("shmstore")


def invoke(*arguments: object, answer: str = "", together: bool = False) -> subprocess.CompletedProcess[str]:
    """
    Run a command as if it were a process whose output is piped.

    Args:
        arguments: The arguments after ``shmstore``.
        answer: The standard input.
        together: Whether standard error goes to standard output.
    """
    command = [*map(str, arguments)]
    out = io.StringIO()
    err = out if together else io.StringIO()
    handlers, level = log.handlers, log.level
    with (
        redirect_stdout(out), redirect_stderr(err), patch.object(sys, "stdin", io.StringIO(answer)),
        patch.object(sys, "path", sys.path[:]), patch.object(spawn, "keep_stderr", spawn.keep_stderr),
    ):  # fmt: skip
        try:
            main(command, prog_name="shmstore")
        except SystemExit as ended:
            code = ended.code
        finally:
            log.handlers = handlers
            log.setLevel(level)
    assert isinstance(code, int)
    return subprocess.CompletedProcess(command, code, out.getvalue(), "" if together else err.getvalue())
