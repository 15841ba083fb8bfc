"""What has to happen in the server at once or not at all, as Lua.

Redis logs the effects of a script as one transaction, so a server that is killed has done all of it after its restart, or
none. `replicate_commands` asks Redis 6 for that; from 7 on it is the only way. Times are the server's own.

    ipckit:{NAME}:sent:ID          string: a message with this id was added (expires after `dedup`)
    ipckit:{NAME}:count            integer: messages published, the field `n` of the last
    ipckit:{NAME}:readers          hash: subscribers without a group -> card
    ipckit:{NAME}:readers:GROUP    hash: consumers of the group -> card ("RUN CLIENT", see `_redis_line.alive`)
    ipckit:{NAME}:later:GROUP      sorted set: entries given back with a delay, by the time they are due (ms)
"""

from __future__ import annotations

from hashlib import sha1
from typing import NamedTuple

#: The consumer that owns what was given back until it is due. No process has this name.
LATER = "ipckit:later"


class Script(NamedTuple):
    text: str
    sha: str


def script(text: str) -> Script:
    text = "if redis.replicate_commands then redis.replicate_commands() end\n" + text.strip() + "\n"
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


def add(dedup: int, exact: bool, maxlen: int | None, maxage: int | None, counted: bool) -> Script:
    """Add an entry unless its id was added before; dedup and maxage in ms. KEYS stream, sent[, count]; ARGV fields.

    Returns the entry's id, 0 for one that is there already. A refusal takes the mark back, or the next try would be
    taken for a duplicate of what was never added.
    """
    trim = f"'MAXLEN', '{'=' if exact else '~'}', '{maxlen}', " if maxlen is not None else ""
    age = ""
    if maxage is not None:
        oldest = f"""local time = redis.call('TIME')
local oldest = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000) - {maxage})
"""
        if trim:
            age = oldest + "redis.call('XTRIM', KEYS[1], 'MINID', '~', oldest)\n"
        else:
            age, trim = oldest, "'MINID', '~', oldest, "
    mark = f"""
if not redis.call('SET', KEYS[2], 1, 'PX', {dedup}, 'NX') then return 0 end
"""
    number = "'n', redis.call('INCR', KEYS[3]), " if counted else ""
    return script(f"""{mark}{age}
local added = redis.pcall('XADD', KEYS[1], {trim}'*', {number}unpack(ARGV))
if type(added) == 'table' and added.err then
  redis.call('DEL', KEYS[2])
  {"redis.call('DECR', KEYS[3])" if counted else ""}
  return added
end
return added
""")


#: Take over what others left. KEYS stream, later, dead, readers. ARGV group, me, room, claim (ms), max_deliver (0: none),
#: number of consumers that are gone, each with its card, number of stale ones, each with its card (who registered again
#: meanwhile is neither), number of entries of mine, them: those were delivered to us, and never reached us, so that once does
#: not count.
#: Returns {{{id, fields, deliveries before}...}, buried, vanished, ms until the next is due or -1}.
CLAIM = script("""
local key, later, dead, readers = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local group, me = ARGV[1], ARGV[2]
local room, claim, most = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local taken, buried, vanished = {}, 0, 0

local function take(id, deliveries)
  redis.call('ZREM', later, id)
  local entry = redis.call('XRANGE', key, id, id)[1]
  if not entry then
    vanished = vanished + redis.call('XACK', key, group, id)
  elseif most > 0 and deliveries >= most then
    local fields = entry[2]
    for _, word in ipairs({'dead-group', group, 'dead-entry', id, 'dead-deliveries', deliveries}) do
      fields[#fields + 1] = word
    end
    redis.call('XADD', dead, '*', unpack(fields))
    redis.call('XACK', key, group, id)
    buried = buried + 1
  else
    redis.call('XCLAIM', key, group, me, 0, id, 'RETRYCOUNT', deliveries + 1, 'JUSTID')
    taken[#taken + 1] = {id, entry[2], deliveries}
    room = room - 1
  end
end

local at = 6
local function names()
  local found, count = {}, tonumber(ARGV[at])
  for i = at + 1, at + 2 * count, 2 do
    if redis.call('HGET', readers, ARGV[i]) == ARGV[i + 1] then found[#found + 1] = ARGV[i] end
  end
  at = at + 2 * count + 1
  return found
end
local gone, stale = names(), names()

for i = at + 1, #ARGV do
  local id = ARGV[i]
  local entry = redis.call('XPENDING', key, group, id, id, 1)[1]
  if entry and entry[2] == me then take(id, math.max(entry[4] - 1, 0)) end
end
if room > 0 then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', later, '-inf', now, 'LIMIT', 0, room)) do
    local entry = redis.call('XPENDING', key, group, id, id, 1)[1]
    if entry then take(id, entry[4]) else redis.call('ZREM', later, id) end
  end
end
for _, name in ipairs(gone) do
  if room > 0 then
    for _, entry in ipairs(redis.call('XPENDING', key, group, '-', '+', room, name)) do take(entry[1], entry[4]) end
  end
  stale[#stale + 1] = name
end
for _, name in ipairs(stale) do
  if #redis.call('XPENDING', key, group, '-', '+', 1, name) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', key, group, name)
    redis.call('HDEL', readers, name)
  end
end
local from = '-'
for _ = 1, 10 do
  local idle = room > 0 and redis.call('XPENDING', key, group, 'IDLE', claim, from, '+', 100) or {}
  for _, entry in ipairs(idle) do
    if room > 0 and not (entry[2] == 'ipckit:later' and redis.call('ZSCORE', later, entry[1])) then
      take(entry[1], entry[4])
    end
  end
  if #idle < 100 then break end
  from = '(' .. idle[100][1]
end
local due = redis.call('ZRANGE', later, 0, 0, 'WITHSCORES')[2]
return {taken, buried, vanished, due and math.max(tonumber(due) - now, 0) or -1}
""")

#: Give entries back, for later. KEYS stream, later; ARGV group, me, delay (ms), deliveries to take back (0, 1), ids.
#: What is not ours any more is left alone.
NACK = script("""
local time = redis.call('TIME')
local due = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[3])
for i = 5, #ARGV do
  local id = ARGV[i]
  local entry = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)[1]
  if entry and entry[2] == ARGV[2] then
    local count = math.max(entry[4] - ARGV[4], 0)
    redis.call('XCLAIM', KEYS[1], ARGV[1], 'ipckit:later', 0, id, 'IDLE', 0, 'RETRYCOUNT', count, 'JUSTID')
    redis.call('ZADD', KEYS[2], due, id)
  end
end
return 0
""")

#: Begin the time of entries again. KEYS stream; ARGV group, me, ids. Returns those that are not ours any more.
EXTEND = script("""
local lost = {}
for i = 3, #ARGV do
  local entry = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1)[1]
  if entry and entry[2] == ARGV[2] then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'IDLE', 0, 'RETRYCOUNT', entry[4], 'JUSTID')
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
""")

#: Where a log ends. KEYS stream, count. Returns {id of the last entry, number of the last message}.
TAIL = script("""
local found = redis.pcall('XINFO', 'STREAM', KEYS[1])
local last = '0-0'
if found.err then
  if redis.call('EXISTS', KEYS[1]) == 1 then return found end
else
  for i = 1, #found, 2 do if found[i] == 'last-generated-id' then last = found[i + 1] end end
end
return {last, tonumber(redis.call('GET', KEYS[2]) or 0)}
""")

#: Strike readers off, unless they have registered again meanwhile. KEYS readers; ARGV name, card, name, card...
FORGET = script("""
for i = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then redis.call('HDEL', KEYS[1], ARGV[i]) end
end
return 0
""")
