"""What not every kind of store can do: the contract suite asks for it, and so may a program."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Capability(StrEnum):
    """Something that a store does itself; its value says what, for people."""

    USE_ORDER = "ids, all and owned_by follow every use of a session, reads included"
    """Without it they follow writes and touches; which session goes first is the engine's business."""

    KEEPS_EXPIRED = "expired sessions stay, and count in ids and length, until they are pruned"
    """Without it they are gone the moment they expire, and no method meets one."""

    MAKES_ROOM = "max, length and memory limit the store, and it decides who goes"
    """Without it these options are refused or mean nothing: the engine has limits of its own."""

    DISPOSES_OF_ALL = "dispose is called for every session that goes"
    """Without it only for those that a call of ours removes or overwrites, in the process that makes the call."""

    STALE = "an expired session can be handed out once more"
    """Without it the option is refused."""

    SHARED_FIGURES = "stats count what all processes did, exactly"
    """Without it they count what this store object did, beside the engine's own figures."""

    ATOMIC_RENAME = "a session that is renamed is at no instant under both ids or under neither"
    """Without it it may be under neither for a moment, and is lost if its writer dies then; it is never under both."""

    SEVERAL_HOSTS = "processes of several hosts can share it"
    """Without it those of one host."""


OF_AN_ARENA: Final = frozenset(Capability) - {Capability.SEVERAL_HOSTS}
"""What a store in shared memory can do."""
