-- Takes from shared counters, for one router process, in one step: all of what a request needs, or nothing.
--
-- KEYS     1 epoch, 2 routers, then the counters, then hashes of months to date.
-- ARGV[1]  the channel on which leases are recalled
-- ARGV[2]  msgpack of [router, hold_ms, member_ms, epoch if there is none, counters, asks,
--          now_ms or 0, epoch the router knows or ''].
--          counter: [kind, limit, want, left, left_ms, a, spent, ledger, tenant, part]
--            rate (0): a = [second, amount, ...] to be added; a second of 0 or less counts from now.
--            held (1): a = what requests of this router hold; spent = what it has spent in all;
--                      ledger = index into KEYS or 0, tenant and part = whose and which sum counts there.
--            left, left_ms: of an earlier lease, not used yet, and for how long it still may be.
--          ask: [counter, amount, counter, amount, ...], counters by their position from 1.
-- Returns  msgpack of [now_ms, epoch, routers, [[extra, life_ms, free, spent], ...], [[status, counter, wait_ms, ...], ...]].
--          status: 1 taken, 0 refused, 2 others hold unused what is missing and were asked for it.
--          wait_ms: until the amount is free again; -1 never, 0 nobody knows.
--
-- A rate's field is a second (how much was taken in it), or x<router> (leased and unused: "amount until").
-- A held counter's are r<router> ("amount until"), s<router> (spent, cumulative) and x<router>.
local WINDOW_S = 60
local PART = 16
local SHORT_MS, LONG_MS = 250, 10000

local m = cmsgpack.unpack(ARGV[2])
local me, hold_ms, member_ms, proposed = m[1], m[2], m[3], m[4]
local counters, asks, now, known = m[5], m[6], m[7], m[8]
if now == 0 then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
local second = math.floor(now / 1000)

local function whole(n) return string.format('%.0f', n) end
local function pair(text)
  local a, b = string.match(text, '^(%S+) (%S+)$')
  return tonumber(a), tonumber(b)
end

if redis.call('SET', KEYS[1], proposed, 'NX') then
  redis.call('PUBLISH', ARGV[1], '')
end
local epoch = redis.call('GET', KEYS[1])
-- Of another epoch: what it corrects is not counted here. It has to say first what it has taken.
local forgotten = known ~= '' and known ~= epoch
redis.call('ZADD', KEYS[2], now, me)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - member_ms)
local routers = redis.call('ZCARD', KEYS[2])

local function load(key, c)
  local s = { buckets = {}, touched = {}, gone = {}, total = 0, spent = 0, outstanding = 0, taken = 0 }
  local fields = redis.call('HGETALL', key)
  for f = 1, #fields, 2 do
    local name, value = fields[f], fields[f + 1]
    local mark, other = string.sub(name, 1, 1), string.sub(name, 2) ~= me
    if mark == 'x' or mark == 'r' then
      local amount, till = pair(value)
      if till <= now then
        s.gone[#s.gone + 1] = name
      elseif other and mark == 'x' then
        s.outstanding = s.outstanding + amount
      elseif other then
        s.total = s.total + amount
      end
    elseif mark == 's' then
      if other then s.spent = s.spent + tonumber(value) end
    else
      local at = tonumber(name)
      if at < second - WINDOW_S then
        s.gone[#s.gone + 1] = name
      else
        s.buckets[at] = tonumber(value)
        s.total = s.total + s.buckets[at]
      end
    end
  end
  if c[1] == 0 and not forgotten then
    for n = 1, #c[6], 2 do
      local at, amount = c[6][n], c[6][n + 1]
      if at <= 0 then at = second + at end
      if at >= second - WINDOW_S then
        s.buckets[at] = (s.buckets[at] or 0) + amount
        s.touched[at] = true
        s.total = s.total + amount
      end
    end
  elseif c[1] == 1 then
    s.total = s.total + c[6] + c[4]
    s.spent = s.spent + c[7]
    if c[8] > 0 then
      local text = redis.call('HGET', KEYS[c[8]], c[9])
      if text then
        local read, month = pcall(cmsgpack.unpack, text)
        if read and type(month) == 'table' then
          local tokens = (month.input_tokens or 0) + (month.output_tokens or 0)
          s.spent = math.max(s.spent, c[10] == 1 and (month.cost_nano_usd or 0) or tokens)
        end
      end
    end
  end
  s.free = c[2] - s.total - s.spent
  return s
end

local function wait_ms(c, s, amount)
  if amount > c[2] then return -1 end
  if c[1] == 1 then return 0 end
  local seconds = {}
  for at in pairs(s.buckets) do seconds[#seconds + 1] = at end
  table.sort(seconds)
  local free = s.free
  for _, at in ipairs(seconds) do
    free = free + s.buckets[at]
    if free >= amount then return math.max(1, (at + WINDOW_S + 1) * 1000 - now) end
  end
  return (WINDOW_S + 1) * 1000
end

local states, answers = {}, {}
for i, c in ipairs(counters) do states[i] = load(KEYS[2 + i], c) end

for n, ask in ipairs(asks) do
  local failing, pending = {}, true
  for j = 1, #ask, 2 do
    local s = states[ask[j]]
    if s.free < ask[j + 1] then
      failing[#failing + 1] = j
      s.short = true
      if s.free + s.outstanding < ask[j + 1] then pending = false end
    end
  end
  if forgotten then
    answers[n] = { 2 }
  elseif #failing == 0 then
    for j = 1, #ask, 2 do
      local s = states[ask[j]]
      s.free = s.free - ask[j + 1]
      s.taken = s.taken + ask[j + 1]
    end
    answers[n] = { 1 }
  else
    local answer = { pending and 2 or 0 }
    for _, j in ipairs(failing) do
      local i = ask[j]
      if pending and not states[i].recalled then
        states[i].recalled = true
        redis.call('PUBLISH', ARGV[1], KEYS[2 + i])
      end
      answer[#answer + 1] = i
      answer[#answer + 1] = wait_ms(counters[i], states[i], ask[j + 1])
    end
    answers[n] = answer
  end
end

local told = {}
for i, c in ipairs(counters) do
  local key, s = KEYS[2 + i], states[i]
  local extra, life = 0, 0
  if c[3] > 0 and not s.short and not forgotten and s.free >= PART then
    extra = math.min(c[3], math.floor(s.free / PART))
    life = SHORT_MS + math.floor(math.max(0, 2 * s.free / c[2] - 1) * (LONG_MS - SHORT_MS))
  end
  if c[1] == 0 then
    local function add(at, amount)
      s.buckets[at] = (s.buckets[at] or 0) + amount
      s.touched[at] = true
    end
    if s.taken > 0 then add(second, s.taken) end
    if extra > 0 then add(math.floor((now + life) / 1000), extra) end
    for at in pairs(s.touched) do redis.call('HSET', key, whole(at), whole(s.buckets[at])) end
  else
    local held = c[6] + c[4] + s.taken + extra
    if held > 0 then
      redis.call('HSET', key, 'r' .. me, whole(held) .. ' ' .. whole(now + hold_ms))
    else
      s.gone[#s.gone + 1] = 'r' .. me
    end
    if c[7] > 0 then redis.call('HSET', key, 's' .. me, whole(c[7])) end
  end
  if c[4] + extra > 0 then
    local till = now + math.max(extra > 0 and life or 0, c[4] > 0 and c[5] or 0)
    redis.call('HSET', key, 'x' .. me, whole(c[4] + extra) .. ' ' .. whole(till))
  else
    s.gone[#s.gone + 1] = 'x' .. me
  end
  if #s.gone > 0 then redis.call('HDEL', key, unpack(s.gone)) end
  redis.call('EXPIRE', key, c[8] > 0 and 40 * 86400 or 90)
  told[i] = { extra, life, s.free - extra, s.spent }
end

return cmsgpack.pack({ now, epoch, routers, told, answers })
