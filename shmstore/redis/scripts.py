"""
What the server does in one step. All keys of a script are in one slot, but for `MOVE`, which a Cluster never gets.

A write bears a tag of its own (see `value`). So a script that comes twice, because its answer was lost, recognises its
own work and says again that it is done.

How long: ``keep`` leaves the deadline, ``never`` has none, ``0`` is over at once, else milliseconds.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

from shmstore.redis.value import HEAD, LONGEST_HEAD

__all__ = ["CHANGE", "DROP", "FORGET", "INDEX", "KEEP", "MOVE", "NEVER", "NOW", "RELEASE", "RENEW", "TOUCH", "Script"]

KEEP, NEVER, NOW = "keep", "never", "0"


class Script(NamedTuple):
    """A script and what the server knows it by."""

    text: str
    sha: str

    @classmethod
    def of(cls, text: str) -> Script:
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


CHANGE: Final = Script.of("""
-- session; expected tag, new value, how long
-- 1: done; nil: no session; else the value that is there instead
local tag = redis.call('GETRANGE', KEYS[1], 0, 7)
if tag ~= ARGV[1] then
  if tag == string.sub(ARGV[2], 1, 8) then return 1 end
  return redis.call('GET', KEYS[1])
end
if ARGV[3] == 'keep' then
  local deadline = redis.call('GETRANGE', KEYS[1], 8, 15)
  redis.call('SET', KEYS[1], string.sub(ARGV[2], 1, 8) .. deadline .. string.sub(ARGV[2], 17), 'KEEPTTL')
elseif ARGV[3] == 'never' then redis.call('SET', KEYS[1], ARGV[2])
elseif ARGV[3] == '0' then redis.call('DEL', KEYS[1])
else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 1
""")

TOUCH: Final = Script.of(f"""
-- session; new deadline and time of use, how long
-- nil: no session; else until when its owner's index knows it
local head = redis.call('GETRANGE', KEYS[1], 0, {HEAD.size})
if #head <= {HEAD.size} then return false end
if ARGV[2] == '0' then redis.call('DEL', KEYS[1])
else
  redis.call('SETRANGE', KEYS[1], 8, ARGV[1])
  if ARGV[2] == 'never' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
end
return string.sub(head, 25, 32)
""")

DROP: Final = Script.of(f"""
-- session, tombstone; expected tag or nothing, how long it is remembered, a name for this call
-- nil: no session; 0: it has changed; else all of it that stands before its data
local head = redis.call('GETRANGE', KEYS[1], 0, {LONGEST_HEAD - 1})
if #head <= {HEAD.size} then
  if ARGV[2] ~= '0' and redis.call('GET', KEYS[2]) == ARGV[3] then return ARGV[3] end
  return false
end
if ARGV[1] ~= '' and string.sub(head, 1, 8) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
if ARGV[2] ~= '0' then redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2]) end
return head
""")

MOVE: Final = Script.of("""
-- old session, new session, tombstone of the old; expected tag, new value, how long, how long it is remembered
-- 1: done; 0: the new one is there; nil: no old session; else the value that is there instead
local tag = redis.call('GETRANGE', KEYS[1], 0, 7)
if tag ~= ARGV[1] then
  if redis.call('GETRANGE', KEYS[2], 0, 7) == string.sub(ARGV[2], 1, 8) then return 1 end
  return redis.call('GET', KEYS[1])
end
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
if ARGV[3] == 'keep' then
  local deadline, left = redis.call('GETRANGE', KEYS[1], 8, 15), redis.call('PTTL', KEYS[1])
  redis.call('SET', KEYS[2], string.sub(ARGV[2], 1, 8) .. deadline .. string.sub(ARGV[2], 17))
  if left >= 0 then redis.call('PEXPIRE', KEYS[2], left) end
elseif ARGV[3] == 'never' then redis.call('SET', KEYS[2], ARGV[2])
elseif ARGV[3] ~= '0' then redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3]) end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[3], '', 'PX', ARGV[4])
return 1
""")

INDEX: Final = Script.of("""
-- index of an owner; session, until when (ms), now (ms)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[3])
return redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
""")

FORGET: Final = Script.of("""
-- index of an owner; session, until when (ms) it was put there for: it may have been put there anew
local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
if score and tonumber(score) == tonumber(ARGV[2]) then return redis.call('ZREM', KEYS[1], ARGV[1]) end
return 0
""")

RENEW: Final = Script.of("""
-- lock; holder, ms
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 0
""")

RELEASE: Final = Script.of("""
-- lock; holder
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
""")
