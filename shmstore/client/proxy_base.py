"""What the proxies of a server's store share."""

from __future__ import annotations

import os
from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Self

from shmstore.client import connection
from shmstore.client.attachment import Attachment, Given
from shmstore.codec.body import Codec
from shmstore.contract import IN_MEMORY, AnyStore, Capability
from shmstore.engine.arena import Arena
from shmstore.engine.header import SERVER_PID
from shmstore.ipc.directory import StoreFiles
from shmstore.options import Duration, Options
from shmstore.store.trace import obey_environment

__all__ = ["ProxyBase"]


class ProxyBase(AnyStore):
    """What both proxies share: they connect again when they are unpickled, and close what they hold."""

    _attachment: Attachment
    _in_place: bool

    @abstractmethod
    def __init__(self, attachment: Attachment, manager: Any = None) -> None: ...

    @property
    def arena(self) -> Arena:
        """The shared memory, as this process has it mapped now."""
        return self._attachment.store.arena

    def sound_arena(self) -> Arena:
        """Return that memory for a listing of all its sessions; see `ArenaStore.sound_arena`."""
        return self._attachment.store.sound_arena()

    @property
    def capabilities(self) -> frozenset[Capability]:
        return IN_MEMORY

    @property
    def options(self) -> Options:
        return self._attachment.store.options

    @property
    def codec(self) -> Codec:
        return self._attachment.store._codec  # a property of a property would be a call more at each request

    @property
    def label(self) -> str:
        return self._attachment.store.label

    def lock(self, sid: str, timeout: Duration = 5.0) -> AbstractContextManager[None]:
        return self._attachment.store.lock(sid, timeout)  # not in the server, which would hold it

    @property
    def closed(self) -> bool:
        return self._attachment.store._arena.file.closed  # as above

    def close(self) -> None:
        self._attachment.close()

    @classmethod
    def attach(cls, files: StoreFiles, given: Given = dict, manager: Any = None) -> Self:
        """
        Attach to the store in these files; see `shmstore.connect`.

        Args:
            files: Where the store is.
            given: Returns the options that this process was given itself.
            manager: Lives as long as the proxy.
        """
        obey_environment()
        proxy = cls(Attachment(files, given), manager)
        connection.log_attached(files, proxy.arena.cells[SERVER_PID])
        return proxy

    @classmethod
    def _attach_again(cls, name: str, directory: str | None) -> Self:
        return cls.attach(StoreFiles.of(name, directory))

    def __reduce__(self) -> Any:
        files = self._attachment.files
        parent, name = os.path.split(files.path)
        # The default directory is that of the user of the process that unpickles it.
        return self._attach_again, (name, None if files.default else parent)

    def __deepcopy__(self, memo: object) -> Self:
        return self  # as with any connection: a copy of what holds it still means the same store

    def __repr__(self) -> str:
        files = self._attachment.files
        how = "in place" if self._in_place else "through its server"
        return f"<{type(self).__name__} {files.name!r} in {os.path.dirname(files.path)}, {how}>"

    __str__ = __repr__
