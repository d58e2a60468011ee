"""Tells an exception that a signal handler raised from one of the code that the signal interrupted."""

from __future__ import annotations

import inspect
import sys
from types import FrameType, TracebackType

__all__ = ["pass_on_interruption"]


def pass_on_interruption(error: BaseException) -> None:
    """
    Raise the exception of a signal handler, if that is what an error is or comes from.

    A handler raises inside whatever is running: SIGALRM of a timeout, say, inside a serializer. That says nothing about
    the serializer, so the exception must neither be converted into an error of ours nor be logged and dropped. To be
    called first in each ``except`` that does so with any exception of foreign code.

    A handler is recognised by its arguments: it is the one function that is called with the frame that it interrupts.
    So it must be written in Python, and keep its second argument. What is raised in other ways, by
    ``PyThreadState_SetAsyncExc`` or ``greenlet.throw``, looks like any exception of the code that was running, and
    should be a `BaseException` as `gevent.Timeout` is.
    """
    running = set[FrameType]()
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    at: BaseException | None = error
    seen = set[int]()
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        tb = at.__traceback__
        if at is not error and tb is not None and tb.tb_frame in running:
            return  # a caller is handling it: it is older than this call
        if _of_handler(tb):
            raise at
        at = at.__cause__ or at.__context__  # foreign code may have converted it


def _of_handler(at: TracebackType | None) -> bool:
    while at is not None and at.tb_next is not None:
        if _was_called_with(at.tb_next.tb_frame, at.tb_frame):
            return True
        at = at.tb_next
    return False


def _was_called_with(frame: FrameType, value: object) -> bool:
    code, found = frame.f_code, frame.f_locals
    count = code.co_argcount
    given = [found.get(name) for name in code.co_varnames[:count]]
    if code.co_flags & inspect.CO_VARARGS:
        given += found.get(code.co_varnames[count + code.co_kwonlyargcount], ())
    return any(each is value for each in given)
