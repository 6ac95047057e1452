-- Holds and settles in Redis: the arithmetic of meter.py, atomically. One script for all of it, so that one digest is known.
--
-- ARGV[1]: what to do, ARGV[2]: its arguments, MessagePack. The answer is MessagePack.
--
-- fairlead:limits:of:SUBJECT      rule -> meter {amount, window, spent, held, share, wave, at}; expires when it says nothing
-- fairlead:limits:gateways        gateway -> when its lease ends
-- fairlead:limits:holds:GATEWAY   hold -> what it holds
-- fairlead:limits:lost:GATEWAY    holds that were taken back from a gateway that did not renew its lease
--
-- Keys are found while it runs: not for Redis Cluster.

local PREFIX = 'fairlead:limits:'
local SECONDS = {second = 1, minute = 60, hour = 3600}
local DUST, CLOCK_STEP, THINNEST = 1e-9, 1, 1e-100
local DAY = 86400
local SLACK = 60 -- seconds that a key outlives what it says
local NUM_REAPED = 500

local input = cmsgpack.unpack(ARGV[2])
local now = input.now
if now == 0 then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end

-- When the day or month of `now` ends, in UTC. Months by the days of the era of 400 years, which begin in March.
local function period_end(window)
  local days = math.floor(now / DAY)
  if window == 'day' then return (days + 1) * DAY end
  local shifted = days + 719468
  local era = math.floor(shifted / 146097)
  local of_era = shifted - era * 146097
  local year = math.floor((of_era - math.floor(of_era / 1460) + math.floor(of_era / 36524) - math.floor(of_era / 146096)) / 365)
  local new_year = 365 * year + math.floor(year / 4) - math.floor(year / 100)
  local month = math.floor((5 * (of_era - new_year) + 2) / 153)
  local next_month
  if month < 11 then
    next_month = new_year + math.floor((153 * (month + 1) + 2) / 5)
  else
    year = year + 1
    next_month = 365 * year + math.floor(year / 4) - math.floor(year / 100) + math.floor(year / 400)
  end
  return (era * 146097 + next_month - 719468) * DAY
end

local function is_calendar(meter) return meter.window == 'day' or meter.window == 'month' end

local function rate_of(meter)
  local seconds = SECONDS[meter.window]
  return seconds and meter.amount / seconds or 0
end

local function meter_of(meters, name, window, amount)
  local meter = meters[name]
  if not meter then
    meter = {amount = amount, window = window, spent = 0, held = 0, share = 1, wave = now, at = now}
    if is_calendar(meter) then meter.at = period_end(window) end
    meters[name] = meter
  end
  return meter
end

local function flow(meter)
  local rate = rate_of(meter)
  if rate > 0 then
    local passed = now - meter.at
    if passed <= 0 then
      if passed < -CLOCK_STEP then meter.at = now end
      return
    end
    meter.at = now
    local amount = passed * rate
    if amount <= meter.spent then
      meter.spent = meter.spent - amount
      return
    end
    amount = amount - meter.spent
    meter.spent = 0
    if meter.held > 0 then
      local rest = meter.held - amount
      meter.share = meter.share * (rest / meter.held)
      if rest > DUST and meter.share > THINNEST then
        meter.held = rest
      else
        meter.spent = math.max(0, rest)
        meter.held, meter.share, meter.wave = 0, 1, now
      end
    end
  elseif is_calendar(meter) and now >= meter.at then
    meter.spent = 0
    meter.at = period_end(meter.window)
  end
end

local function allow(meter, amount)
  if amount < meter.amount and rate_of(meter) > 0 then meter.spent = math.min(meter.spent, amount) end
  meter.amount = amount
end

local function load(subject)
  local stored = redis.call('GET', PREFIX .. 'of:' .. subject)
  return stored and cmsgpack.unpack(stored) or {}
end

local function save(subject, meters)
  local seconds = 0
  for _, meter in pairs(meters) do
    if meter.held > 0 then seconds = math.max(seconds, DAY) end
    if is_calendar(meter) then
      if meter.spent > 0 then seconds = math.max(seconds, meter.at - now) end
    elseif meter.spent > 0 then
      local rate = rate_of(meter)
      seconds = math.max(seconds, rate > 0 and meter.spent / rate or DAY)
    end
  end
  local key = PREFIX .. 'of:' .. subject
  if seconds > 0 then
    redis.call('SET', key, cmsgpack.pack(meters), 'PX', string.format('%.0f', math.ceil(seconds + SLACK) * 1000))
  else
    redis.call('DEL', key)
  end
end

-- Ends what one hold holds; `used` is nil where it is released.
local function finish(record, used, was_lost)
  for _, entry in ipairs(record) do
    local subject, parts = entry[1], entry[2]
    local meters = load(subject)
    for _, part in ipairs(parts) do
      local name, window, amount, unit, needed, share, wave = unpack(part)
      local meter = meter_of(meters, name, window, amount)
      flow(meter)
      if was_lost then needed = 0 end
      local left = meter.wave == wave and needed * (meter.share / share) or 0
      local rest = meter.held - left
      meter.held = rest > DUST and rest or 0
      if used and unit ~= '' then
        local owed = (used[unit] or 0) - (needed - left)
        if owed > 0 then meter.spent = meter.spent + owed end
      end
    end
    save(subject, meters)
  end
end

local function look(create)
  local found, fits = {}, true
  local rows = {}
  for i, subject in ipairs(input.subjects) do
    local meters = load(subject[1])
    found[i] = meters
    for _, rule in ipairs(subject[2]) do
      local name, window, amount, _, needed = unpack(rule)
      local meter = meter_of(meters, name, window, amount)
      flow(meter)
      allow(meter, amount)
      if meter.spent + meter.held + math.max(needed, 0) > amount + DUST * math.max(1, amount) and needed >= 0 then fits = false end
    end
  end
  if create and fits then
    local record = {}
    for i, subject in ipairs(input.subjects) do
      local parts = {}
      for j, rule in ipairs(subject[2]) do
        local name, window, amount, unit, needed = unpack(rule)
        local meter = found[i][name]
        needed = math.max(needed, 0)
        meter.held = meter.held + needed
        parts[j] = {name, window, amount, unit, needed, meter.share, meter.wave}
      end
      record[i] = {subject[1], parts}
      save(subject[1], found[i])
    end
    redis.call('HSET', PREFIX .. 'holds:' .. input.gateway, input.id, cmsgpack.pack(record))
    redis.call('ZADD', PREFIX .. 'gateways', 'GT', now + input.lease, input.gateway)
  end
  for i, subject in ipairs(input.subjects) do
    for _, rule in ipairs(subject[2]) do
      local meter = found[i][rule[1]]
      rows[#rows + 1] = {meter.spent, meter.held, is_calendar(meter) and meter.at or 0}
    end
  end
  return {fits, now, rows}
end

local what = {}

function what.hold() return look(true) end

function what.standing() return look(false) end

function what.settle()
  for _, state in ipairs({'holds:', 'lost:'}) do
    local key = PREFIX .. state .. input.gateway
    local stored = redis.call('HGET', key, input.id)
    if stored then
      redis.call('HDEL', key, input.id)
      finish(cmsgpack.unpack(stored), input.used or nil, state == 'lost:')
      return true
    end
  end
  return false
end

function what.restore()
  local meters = load(input.subject)
  local meter = meter_of(meters, input.rule, input.window, 0)
  flow(meter)
  meter.spent = math.max(meter.spent, input.spent)
  save(input.subject, meters)
  return true
end

-- Renews the leases of a gateway (of its connections, each of which has one) and takes back what others held whose lease has ended.
function what.renew()
  local leases = PREFIX .. 'gateways'
  for _, gateway in ipairs(input.gateways) do
    redis.call('ZADD', leases, 'GT', now + input.lease, gateway)
    redis.call('EXPIRE', PREFIX .. 'holds:' .. gateway, DAY)
  end
  local num_reaped = 0
  for _, gateway in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, 16)) do
    local holds, lost = PREFIX .. 'holds:' .. gateway, PREFIX .. 'lost:' .. gateway
    for _, id in ipairs(redis.call('HRANDFIELD', holds, NUM_REAPED) or {}) do
      local stored = redis.call('HGET', holds, id)
      finish(cmsgpack.unpack(stored), nil, false)
      redis.call('HSET', lost, id, stored)
      redis.call('HDEL', holds, id)
      num_reaped = num_reaped + 1
    end
    redis.call('EXPIRE', lost, 3600)
    if redis.call('EXISTS', holds) == 0 then redis.call('ZREM', leases, gateway) end
  end
  return num_reaped
end

return cmsgpack.pack(what[ARGV[1]]())
