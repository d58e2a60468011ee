from mmap import mmap

from shmstore.engine.frame import Key
from shmstore.engine.reader import Entry

INTERFACE: tuple[int, ...]

class Core:
    def __new__(
        cls, memory: mmap | bytearray, mutex: int, depth_word: int, locked_once: int, geometry: tuple[int, ...]
    ) -> Core: ...
    def read(self, low: int, high: int, /) -> Entry | int | None: ...
    def get(self, sid: object, now: int, counted: bool, /) -> bytes | int | None: ...
    def load(self, sid: object, now: int, /) -> tuple[Entry, int, bytes | None, str | None] | int | None: ...
    def put(
        self, sid: object, owner: str | None, payload: bytes, span: int, weight: int, present: bool | None, now: int, /
    ) -> int: ...
    def exchange(
        self,
        entry: Entry,
        key: Key,
        front: bytes,
        payload: bytes,
        owner: int | None,
        weight: int,
        span: int | None,
        count: int,
        tombstone: bool,
        now: int,
        /,
    ) -> int: ...
    def touch(self, sid: object, span: int, now: int, /) -> int: ...
    def drop(self, sid: object, tombstone: bool, now: int, /) -> int: ...
    def count_in(self, row: int, /) -> None: ...
    def close(self) -> None: ...

def is_plain(value: object, depth: int, /) -> bool: ...
