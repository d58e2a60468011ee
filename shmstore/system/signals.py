"""Distinguishes exceptions raised by signal handlers from exceptions of the code that the signal interrupted."""

from __future__ import annotations

import contextlib
import inspect
import sys
from types import FrameType, TracebackType

__all__ = ["pass_on_interruption", "suppressing"]


def pass_on_interruption(error: BaseException) -> None:
    """
    Raise the exception of a signal handler, if an error is one or was caused by one.

    A handler raises inside whatever code is running: SIGALRM of a timeout inside a serializer, for example. That is not
    an error of the serializer, so the exception must be neither converted into a shmstore error nor logged and dropped.
    Call this first in each ``except`` that does so with any exception of foreign code.

    A handler is recognised by its arguments: it is the only function that is called with the frame it interrupts. It
    must therefore be written in Python and keep its second argument. An exception raised in another way, by
    ``PyThreadState_SetAsyncExc`` or ``greenlet.throw``, cannot be recognised and should be a `BaseException`, as
    `gevent.Timeout` is.
    """
    running = set[FrameType]()
    frame: FrameType | None = sys._getframe(1)  # not this one, which would then refer to itself
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    current: BaseException | None = error
    seen = set[int]()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        tb = current.__traceback__
        if current is not error and tb is not None and tb.tb_frame in running:
            return  # a caller is handling this exception, so it is older than this call
        if _is_from_handler(tb):
            raise current
        current = current.__cause__ or current.__context__  # foreign code may have converted it


class suppressing(contextlib.suppress):
    """`contextlib.suppress` for `OSError` and other classes that a signal handler's exception may belong to."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        suppressed = super().__exit__(kind, error, traceback)
        if suppressed and error is not None:
            pass_on_interruption(error)
        return suppressed


def _is_from_handler(tb: TracebackType | None) -> bool:
    while tb is not None and tb.tb_next is not None:
        if _was_called_with(tb.tb_next.tb_frame, tb.tb_frame):
            return True
        tb = tb.tb_next
    return False


def _was_called_with(frame: FrameType, value: object) -> bool:
    code, local = frame.f_code, frame.f_locals
    count = code.co_argcount
    arguments = [local.get(name) for name in code.co_varnames[:count]]
    if code.co_flags & inspect.CO_VARARGS:
        arguments += local.get(code.co_varnames[count + code.co_kwonlyargcount], ())
    return any(each is value for each in arguments)
