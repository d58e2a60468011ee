"""
The scripts, each of which is one step on the server. All keys of a script are in one slot, except for `CHANGE` to
another key, `DROP_OWNED` and the indexes of owners. These are not used in a Cluster, where an index is updated by a
separate call (`Engine`).

Arguments of several scripts:

    now, span   microseconds by the server's clock, and the ttl from then on: a number, ``keep`` the deadline,
                ``never`` expires, ``0`` expires at once
    prefix      of the keys of indexes; empty in a Cluster
    promised    the time until which the owner's index lists the session, in a Cluster; else 0. If it is too early, the
                answer is ``{'index', owner, deadline}`` and nothing is done: the caller updates the index first

If the key of an index holds another type, the answer is ``{'wrong', owner}`` or an error, and nothing is done.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

from shmstore.redis.value import FOREVER, HEAD, MAX_HEAD, NO_OWNER

__all__ = [
    "BREAK", "CHANGE", "CLEAR_WAY", "COUNT", "DROP", "DROP_OWNED", "EXCHANGE", "PUT", "RELEASE", "RENAMED", "RENEW",
    "REPLACE", "STORE", "TEXTS", "TICK", "TOUCH", "Script",
]  # fmt: skip

CLOCK_PERIOD: Final = 60 * 10**6  # microseconds for which a process estimates the time before it asks again

RENAMED: Final = "renamed"
"""The content of a session's tombstone if the session was renamed, not removed."""

TEXTS: Final[dict[str, str]] = {}
"""The text of each script by its SHA-1."""


class Script(NamedTuple):
    """A script, identified by its SHA-1. A server knows it once it has received its text."""

    sha: str

    @classmethod
    def of(cls, *text: str) -> Script:
        whole = "".join(text)
        sha = hashlib.sha1(whole.encode(), usedforsecurity=False).hexdigest()
        TEXTS[sha] = whole
        return cls(sha)

    def on(self, keys: list[str], *arguments: object) -> tuple[object, ...]:
        """Return the command that runs it."""
        return "EVALSHA", self.sha, len(keys), *keys, *arguments


_HEAD: Final = f"""
local FOREVER, NOBODY = {FOREVER}, string.rep('\\0', {len(NO_OWNER)})
local byte, sub, pack = string.byte, string.sub, function(number) return struct.pack('>I8', number) end

local function head_of(data)
  local head = {{tag = sub(data, 1, 8), owner = sub(data, 41, 48)}}
  head.deadline, head.used, head.indexed, head.created = struct.unpack('>I8I8I8I8', data, 9)
  return head
end

local function index_of(prefix, owner)
  return prefix .. string.gsub(owner, '.', function(each) return string.format('%02x', byte(each)) end)
end

local function deadline_of(now, span) return span == 'never' and FOREVER or now + span end

local function score_of(time) return time >= FOREVER and 'inf' or string.format('%.0f', time / 1000) end

-- Make sure that the owner's index lists a session until its deadline. Return nil, or the answer of the script.
local function note(head, prefix, member, now, promised)
  if head.owner == NOBODY then head.indexed = 0
  elseif head.deadline > head.indexed then
    if prefix == '' then
      if promised < head.deadline then return {{'index', head.owner, string.format('%.0f', head.deadline)}} end
      head.indexed = promised
    else
      head.indexed = head.deadline >= FOREVER and FOREVER or 2 * head.deadline - now
      local told = redis.pcall('ZADD', index_of(prefix, head.owner), score_of(head.indexed), member)
      if type(told) == 'table' and told.err then
        return string.find(told.err, 'WRONGTYPE', 1, true) and {{'wrong', head.owner}} or told
      end
    end
  end
end
"""

# The content of a session: the parts of a body (`shmstore.codec.body`), and a msgpack map that is changed key by key.
_BODY: Final = """
-- Return the position after the value that starts at a position.
local FIXED = {[0xca] = 5, [0xcb] = 9, [0xcc] = 2, [0xcd] = 3, [0xce] = 5, [0xcf] = 9, [0xd0] = 2, [0xd1] = 3,
               [0xd2] = 5, [0xd3] = 9, [0xd4] = 3, [0xd5] = 4, [0xd6] = 6, [0xd7] = 10, [0xd8] = 18}
-- bytes of the length field, other bytes, values per unit of length
local COUNTED = {[0xc4] = {1, 2}, [0xc5] = {2, 3}, [0xc6] = {4, 5}, [0xc7] = {1, 3}, [0xc8] = {2, 4}, [0xc9] = {4, 6},
                 [0xd9] = {1, 2}, [0xda] = {2, 3}, [0xdb] = {4, 5}, [0xdc] = {2, 3, 1}, [0xdd] = {4, 5, 1},
                 [0xde] = {2, 3, 2}, [0xdf] = {4, 5, 2}}
local UNSIGNED = {'>I1', '>I2', nil, '>I4'}

local function past(data, at)
  local left = 1
  while left > 0 do
    local first = byte(data, at)
    left = left - 1
    if first < 0x80 or first >= 0xe0 then at = at + 1
    elseif first < 0x90 then left, at = left + 2 * (first - 0x80), at + 1
    elseif first < 0xa0 then left, at = left + first - 0x90, at + 1
    elseif first < 0xc0 then at = at + 1 + first - 0xa0
    elseif first < 0xc4 then at = at + 1
    elseif FIXED[first] then at = at + FIXED[first]
    else
      local size, besides, each = unpack(COUNTED[first])
      local count = struct.unpack(UNSIGNED[size], data, at + 1)
      if each then left, at = left + each * count, at + besides else at = at + besides + count end
    end
  end
  return at
end

-- Return a map with changes, or nil if it has a key that is not a string: it may equal a key of another type.
local function merged(data, set, order, delete)
  local first, at, count = byte(data, 1), 2, nil
  if first >= 0x80 and first < 0x90 then count = first - 0x80
  elseif first == 0xde then count, at = struct.unpack('>I2', data, 2)
  else count, at = struct.unpack('>I4', data, 2) end
  local parts, kept, total, from = {''}, {}, 0, at
  for _ = 1, count do
    local begins, first = at, byte(data, at)
    if first < 0xa0 or first >= 0xc0 and first ~= 0xd9 and first ~= 0xda and first ~= 0xdb then return nil end
    local value = past(data, at)
    local key = sub(data, begins, value - 1)
    at = past(data, value)
    local new = set[key]
    if new or delete[key] then  -- the bytes before it are copied in one piece
      parts[#parts + 1] = sub(data, from, begins - 1)
      from = at
      if new then
        parts[#parts + 1], parts[#parts + 2] = key, new
        kept[key], total = true, total + 1
      end
    else total = total + 1 end
  end
  if at ~= #data + 1 then error() end
  parts[#parts + 1] = sub(data, from, at - 1)
  for _, key in ipairs(order) do
    if not kept[key] then
      parts[#parts + 1], parts[#parts + 2] = key, set[key]
      total = total + 1
    end
  end
  if total < 16 then parts[1] = string.char(0x80 + total)
  elseif total < 65536 then parts[1] = '\\222' .. struct.pack('>I2', total)
  else parts[1] = '\\223' .. struct.pack('>I4', total) end
  return table.concat(parts)
end
"""

CHANGE: Final = Script.of(
    _HEAD,
    _BODY,
    f"""
-- keys: session; only to rename it: its new key, tombstone of the old one
-- arguments: tag, now, span, prefix, member of the index, promised, name of the codec, maximum bytes,
--   'keep' or digest of the owner, owner, old member and new id or '', ttl of the tombstone (ms) or '0': none,
--   number of keys to set, each key and value, keys to delete;
--   or 'whole', the expected tag, the new payload
-- answer: nil: no session; 0: the new key is used; 1: done; else {{'large', bytes}}: more than the maximum; {{'odd'}}:
--   it has keys that are not strings, or another tag; {{'index', ...}}, {{'wrong', ...}}
local data = redis.call('GET', KEYS[1])
if not data or #data <= {HEAD.size} then return false end
if KEYS[2] and redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local now, span, prefix, member = tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local head, body = head_of(data), sub(data, {HEAD.size + 1})

if #body < 4 then return false end
local of_id, of_codec, of_owner = struct.unpack('<I1I1I2', body)
local codec_at = of_id + 6
local owner_at = codec_at + of_codec
local payload_at = owner_at + (of_owner > 0 and of_owner - 1 or 0)
if sub(body, codec_at, owner_at - 1) ~= ARGV[7] then return false end

local payload
if ARGV[14] == 'whole' then
  if head.tag ~= ARGV[15] then return {{'odd'}} end
  payload = ARGV[16]
else
  local set, order, delete, sets = {{}}, {{}}, {{}}, tonumber(ARGV[14])
  for at = 15, 13 + 2 * sets, 2 do
    set[ARGV[at]] = ARGV[at + 1]
    order[#order + 1] = ARGV[at]
  end
  for at = 15 + 2 * sets, #ARGV do delete[ARGV[at]] = true end
  local readable
  readable, payload = pcall(merged, sub(body, payload_at), set, order, delete)
  if not readable then return false end
  if not payload then return {{'odd'}} end
end
if #payload > tonumber(ARGV[8]) then return {{'large', #payload}} end

local before = {{owner = head.owner}}
local id, owner = sub(body, 5, codec_at - 1), sub(body, owner_at, payload_at - 1)
if ARGV[9] ~= 'keep' then
  head.owner, owner = ARGV[9], ARGV[10]
  if head.owner ~= before.owner then head.indexed = 0 end
end
if KEYS[2] then id, head.indexed = ARGV[12], 0 end
local life
if span == 'keep' then life = KEYS[2] and redis.call('PTTL', KEYS[1]) or 'keep'
else
  head.deadline = deadline_of(now, span)
  life = span == 'never' and -1 or math.ceil(span / 1000)
end
local instead = life ~= 0 and note(head, prefix, member, now, tonumber(ARGV[6]))
if instead then return instead end
if prefix ~= '' and before.owner ~= NOBODY and (KEYS[2] or head.owner ~= before.owner) then
  redis.pcall('ZREM', index_of(prefix, before.owner), ARGV[11])
end

local parts = {{
  ARGV[1], pack(head.deadline), pack(now), pack(head.indexed), pack(head.created), head.owner,
  struct.pack('<I1I1I2', #id - 1, of_codec, head.owner == NOBODY and 0 or #owner + 1), id, ARGV[7],
  head.owner == NOBODY and '' or owner, payload,
}}
local key, value = KEYS[2] or KEYS[1], table.concat(parts)
if life == 'keep' then redis.call('SET', key, value, 'KEEPTTL')
elseif life == -1 then redis.call('SET', key, value)
elseif life ~= 0 then redis.call('SET', key, value, 'PX', life)
elseif not KEYS[2] then redis.call('DEL', key) end
if KEYS[2] then
  redis.call('DEL', KEYS[1])
  if ARGV[13] ~= '0' then redis.call('SET', KEYS[3], '{RENAMED}', 'PX', ARGV[13]) end
end
return 1
""",
)

TOUCH: Final = Script.of(
    _HEAD,
    f"""
-- keys: session; arguments: now, span, prefix, member, promised
-- answer: nil: no session; 1: done; else {{'index', ...}}, {{'wrong', ...}}
local data, now, span = redis.call('GETRANGE', KEYS[1], 0, {HEAD.size}), tonumber(ARGV[1]), ARGV[2]
if #data <= {HEAD.size} then return false end
if span == '0' then
  redis.call('DEL', KEYS[1])
  return 1
end
local head = head_of(data)
head.deadline = deadline_of(now, span)
local instead = note(head, ARGV[3], ARGV[4], now, tonumber(ARGV[5]))
if instead then return instead end
redis.call('SETRANGE', KEYS[1], 8, pack(head.deadline) .. pack(now) .. pack(head.indexed))
if span == 'never' then redis.call('PERSIST', KEYS[1])
else redis.call('PEXPIRE', KEYS[1], math.ceil(span / 1000)) end
return 1
""",
)

REPLACE: Final = Script.of("""
-- keys: session; arguments: expected tag, new value, ttl (ms; 'never', '0': remove it)
-- answer: 1: done; nil: no session; else the stored value
if redis.call('GETRANGE', KEYS[1], 0, 7) ~= ARGV[1] then return redis.call('GET', KEYS[1]) end
if ARGV[3] == 'never' then redis.call('SET', KEYS[1], ARGV[2])
elseif ARGV[3] == '0' then redis.call('DEL', KEYS[1])
else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 1
""")

PUT: Final = Script.of("""
-- keys: session
-- arguments: value, ttl (ms; 'never', '0': remove it), 'NX', 'XX', the expected tag or '', index, score, member
-- answer: 1: done; nil: it exists, or does not; with a tag the stored value
local value, life, how = ARGV[1], ARGV[2], ARGV[3]
if #how == 2 then
  if (redis.call('EXISTS', KEYS[1]) == 1) ~= (how == 'XX') then return false end
elseif how ~= '' and redis.call('GETRANGE', KEYS[1], 0, 7) ~= how then return redis.call('GET', KEYS[1]) end
redis.call('ZADD', ARGV[4], 'GT', ARGV[5], ARGV[6])
if life == 'never' then redis.call('SET', KEYS[1], value)
elseif life == '0' then redis.call('DEL', KEYS[1])
else redis.call('SET', KEYS[1], value, 'PX', life) end
return 1
""")

EXCHANGE: Final = Script.of(f"""
-- keys: session; only to rename it: its new key, tombstone of the old one
-- arguments: expected tag, new value, ttl (ms; 'never'), index to leave or '', old member, index to join or '', score,
--   member, ttl of the tombstone (ms) or '0': none
-- answer: 1: done; nil: it has another tag, or the new key is used
if redis.call('GETRANGE', KEYS[1], 0, 7) ~= ARGV[1] then return false end
local key = KEYS[2] or KEYS[1]
if KEYS[2] and redis.call('EXISTS', key) == 1 then return false end
if ARGV[6] ~= '' then redis.call('ZADD', ARGV[6], 'GT', ARGV[7], ARGV[8]) end
if ARGV[4] ~= '' then redis.pcall('ZREM', ARGV[4], ARGV[5]) end
if ARGV[3] == 'never' then redis.call('SET', key, ARGV[2]) else redis.call('SET', key, ARGV[2], 'PX', ARGV[3]) end
if KEYS[2] then
  redis.call('DEL', KEYS[1])
  if ARGV[9] ~= '0' then redis.call('SET', KEYS[3], '{RENAMED}', 'PX', ARGV[9]) end
end
return 1
""")

# The rule for conflicts of a copy: `shmstore.transfer.copy.is_stored` gives the reasons.
STORE: Final = Script.of(
    _HEAD,
    f"""
-- keys: session, tombstone; arguments: value, ttl (ms; 'never'), prefix, member, by how much equal deadlines may differ
-- answer: 1: stored; 0: the stored one stays, or it was ended a moment ago; 'full': no memory; {{'wrong', owner}}
local value, there = ARGV[1], redis.call('GET', KEYS[1])
local new, failed = head_of(value), nil
local function try(...)
  local answer = not failed and redis.pcall(...)
  failed = failed or type(answer) == 'table' and answer.err
end
if there and #there > {HEAD.size} then
  local old = head_of(there)
  local same = sub(value, {HEAD.size + 1}) == sub(there, {HEAD.size + 1})
  if new.used <= old.used or same and math.abs(new.deadline - old.deadline) <= tonumber(ARGV[5]) then return 0 end
elseif there or redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
if ARGV[3] ~= '' and new.owner ~= NOBODY then
  try('ZADD', index_of(ARGV[3], new.owner), 'GT', score_of(new.indexed), ARGV[4])
end
if ARGV[2] == 'never' then try('SET', KEYS[1], value) else try('SET', KEYS[1], value, 'PX', ARGV[2]) end
if not failed then return 1 end
if string.find(failed, 'OOM', 1, true) then return 'full' end
return string.find(failed, 'WRONGTYPE', 1, true) and {{'wrong', new.owner}} or {{err = failed}}
""",
)

DROP: Final = Script.of(
    _HEAD,
    f"""
-- keys: session, tombstone; arguments: expected tag or '', ttl of the tombstone (ms) or '0': none, prefix, member,
--   content of the tombstone
-- answer: nil: no session; 0: it has changed; else its head
local data = redis.call('GETRANGE', KEYS[1], 0, {HEAD.size})
if #data <= {HEAD.size} then return false end
if ARGV[1] ~= '' and sub(data, 1, 8) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
if ARGV[2] ~= '0' then redis.call('SET', KEYS[2], ARGV[5], 'PX', ARGV[2]) end
local head = head_of(data)
if ARGV[3] ~= '' and head.owner ~= NOBODY then redis.pcall('ZREM', index_of(ARGV[3], head.owner), ARGV[4]) end
return data
""",
)

BREAK: Final = Script.of(f"""
-- keys: key reserved for a session
-- answer: nil: not reserved; else the reservation is removed: the member of the index that the session comes from
local size = redis.call('STRLEN', KEYS[1])
if size == 0 or size > {HEAD.size} then return false end
local origin = redis.call('GETRANGE', KEYS[1], 8, -1)
redis.call('DEL', KEYS[1])
return origin
""")

DROP_OWNED: Final = Script.of(
    f"""
-- keys: index of an owner
-- arguments: owner, text before and after a member in the key of its session,
--   how many members to look at, not counting the kept ones; the members to keep
-- answer: number of removed sessions; number of members left, 0 if this has looked at all of them
local keep, count, most = {{}}, 0, ARGV[4] + #ARGV - 4
for at = 5, #ARGV do keep[ARGV[at]] = true end
local members = redis.call('ZRANGE', KEYS[1], 0, most - 1)
for _, member in ipairs(members) do
  local key = ARGV[2] .. member .. ARGV[3]
  local data = redis.call('GETRANGE', key, {HEAD.size}, {MAX_HEAD - 1})
  local mine = false
  if #data > 4 then
    local of_id, of_codec, of_owner = struct.unpack('<I1I1I2', data)
    local at = of_id + of_codec + 6
    mine = of_owner > 0 and string.sub(data, at, at + of_owner - 2) == ARGV[1]
  end
  if mine and not keep[member] then
    redis.call('DEL', key)
    count = count + 1
  end
  if mine and not keep[member] or #data == 0 then redis.call('ZREM', KEYS[1], member) end
end
return {{count, #members < most and 0 or redis.call('ZCARD', KEYS[1])}}
"""
)

RENEW: Final = Script.of("""
-- keys: lock; arguments: holder, ms
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 0
""")

RELEASE: Final = Script.of("""
-- keys: lock; arguments: holder
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
""")

CLEAR_WAY: Final = Script.of("""
-- keys: index of an owner
-- answer: nil: the type is right, or the key does not exist; else the type that was found and removed
local found = redis.call('TYPE', KEYS[1]).ok
if found == 'zset' or found == 'none' then return false end
redis.call('DEL', KEYS[1])
return found
""")

COUNT: Final = Script.of("""
-- keys: counters; arguments: names and what to add to each
-- answer: 1, or 0 if nothing was added: the server is full, or a replica; then the names and values of all counters
local added, found = 1, redis.call('TYPE', KEYS[1]).ok
if found ~= 'hash' and found ~= 'none' then redis.call('DEL', KEYS[1]) end
for at = 1, #ARGV, 2 do
  local done = redis.pcall('HINCRBY', KEYS[1], ARGV[at], ARGV[at + 1])
  if type(done) == 'table' and done.err then
    if not (string.find(done.err, 'OOM', 1, true) or string.find(done.err, 'READONLY', 1, true)) then return done end
    added = 0
    break
  end
end
local answer = redis.call('HGETALL', KEYS[1])
table.insert(answer, 1, added)
return answer
""")

TICK: Final = Script.of(f"""
-- keys: clock; arguments: the time as the caller estimates it, 0 without an estimate
-- answer: the time, which never goes back, and the server's clock, which may (microseconds)
local time, kept = redis.call('TIME'), redis.pcall('GET', KEYS[1])
local here, now = time[1] * 1000000 + time[2], nil
local last, seen = string.match(type(kept) == 'string' and kept or '', '^(%d+) (%d+)$')
if last and here >= tonumber(seen) then now = last + here - seen
elseif last then now = math.max(last + {CLOCK_PERIOD}, tonumber(ARGV[1]))  -- others may have estimated that far
else now = math.max(here, tonumber(ARGV[1])) end
-- A full server and a replica refuse the write.
redis.pcall('SET', KEYS[1], string.format('%.0f %.0f', now, here))
return {{string.format('%.0f', now), string.format('%.0f', here)}}
""")
