-- One tenant's quota in one key: what services/auth/quota.py decides, where Redis keeps it.
--
-- KEYS[1]: the tenant's. ARGV[1]: JSON, written by services/auth/redis_script.py, which reads the
-- reply as well. Amounts are {requests, tokens, slots}. A test runs this and the database's leases
-- side by side and holds each answer of one against the other's.

local WINDOW_S = 60
local WISH_PART = 4
local UNLIMITED = 2 ^ 60
local DAY_S = 86400

local ask = cjson.decode(ARGV[1])

-- The server's clock, so that instances need not agree; tests bring one of their own.
local function server_time()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

-- Days since 1970 and months since year 0, of UTC (Howard Hinnant, civil_from_days).
local function calendar(at)
  local days = math.floor(at / DAY_S)
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor(
    (doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  -- years begin in March here
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return days, year * 12 + month - 1
end

local function open_of(lease)
  local open = {}
  for kind = 1, 3 do
    local left = lease.granted[kind] - lease.spent[kind] - lease.returned[kind]
    open[kind] = math.max(left, 0)
  end
  return open
end

local function settle(state, requests, tokens, at)
  if requests == 0 and tokens == 0 then return end
  local second = math.floor(at)
  state.day_tokens = state.day_tokens + tokens
  state.month_tokens = state.month_tokens + tokens
  for _, cell in ipairs(state.cells) do
    if cell[1] == second then
      cell[2], cell[3] = cell[2] + requests, cell[3] + tokens
      return
    end
  end
  table.insert(state.cells, {second, requests, tokens})
end

local function minute_of(state)
  local requests, tokens = 0, 0
  for _, cell in ipairs(state.cells) do
    requests, tokens = requests + cell[2], tokens + cell[3]
  end
  return requests, tokens
end

-- A clock that was ahead and was put right: what is settled counts as of now.
local function set_back(state, now)
  local ahead = state.updated_at - now
  if ahead <= WINDOW_S then return end
  if #state.cells > 0 then
    local requests, tokens = minute_of(state)
    state.cells = {{math.floor(now), requests, tokens}}
  end
  state.day, state.month = calendar(now)
  state.updated_at = now
  for _, lease in pairs(state.leases) do
    lease.expires_at = lease.expires_at - ahead
  end
end

-- Forgets what has left its window; the time, which does not go back by itself.
local function advance(state, now)
  now = math.max(now, state.updated_at)
  state.updated_at = now
  local kept = {}
  for _, cell in ipairs(state.cells) do
    if cell[1] >= math.floor(now) - WINDOW_S then table.insert(kept, cell) end
  end
  state.cells = kept
  local day, month = calendar(now)
  if day ~= state.day then state.day, state.day_tokens = day, 0 end
  if month ~= state.month then state.month, state.month_tokens = month, 0 end
  return now
end

local function settle_open(state, lease, at)
  local open = open_of(lease)
  settle(state, open[1], open[2], at)
  lease.spent[1], lease.spent[2] = lease.spent[1] + open[1], lease.spent[2] + open[2]
end

-- What is open of a lease counts as spent; its slots are free.
local function finish(state, id, at)
  local lease = state.leases[id]
  if not lease.is_over then settle_open(state, lease, at) end
  state.leases[id] = nil
end

-- Leases that nobody reported for; their slots stay taken for as long as a request may run.
local function expire(state, now)
  local late = {}
  for id, lease in pairs(state.leases) do
    if lease.expires_at <= now then table.insert(late, id) end
  end
  for _, id in ipairs(late) do
    local lease = state.leases[id]
    local is_free = open_of(lease)[3] == 0 or lease.expires_at + ask.max_request_s <= now
    if lease.is_over or is_free then
      finish(state, id, lease.expires_at)
    else
      settle_open(state, lease, lease.expires_at)
      lease.is_over = true
      lease.expires_at = lease.expires_at + ask.max_request_s
    end
  end
end

-- Leases of earlier runs of the gateway that says hello.
local function older_of(state)
  local older = {}
  for id, lease in pairs(state.leases) do
    if lease.gateway == ask.gateway and lease.incarnation ~= ask.incarnation then
      table.insert(older, id)
    end
  end
  return older
end

local function all_open(state)
  local sum = {0, 0, 0}
  for _, lease in pairs(state.leases) do
    local open = open_of(lease)
    for kind = 1, 3 do sum[kind] = sum[kind] + open[kind] end
  end
  return sum
end

local function room(state)
  local limits = ask.limits
  local function left(name, spent) return (limits[name] or UNLIMITED) - spent end
  local requests, tokens = minute_of(state)
  local open = all_open(state)
  local free = {
    left('requests_per_minute', requests),
    math.min(
      left('tokens_per_minute', tokens),
      left('daily_tokens', state.day_tokens),
      left('monthly_tokens', state.month_tokens)),
    left('max_concurrency', 0),
  }
  for kind = 1, 3 do free[kind] = math.max(free[kind] - open[kind], 0) end
  return free
end

-- A need as far as there is room, a wish in moderation.
local function grant(state, lease)
  local free, granted = room(state), {}
  for kind = 1, 3 do
    local need = math.min(ask.needed[kind], free[kind])
    local share = math.floor((free[kind] - need) / WISH_PART)
    granted[kind] = need + math.min(ask.wanted[kind], share)
    lease.granted[kind] = lease.granted[kind] + granted[kind]
  end
  return granted
end

-- Totals only grow, so that a report may come twice, or late.
local function take_in(state, lease, now)
  local more = {}
  for kind = 1, 2 do
    more[kind] = math.max(ask.spent[kind] - lease.spent[kind], 0)
    lease.spent[kind] = lease.spent[kind] + more[kind]
  end
  settle(state, more[1], more[2], now)
  for kind = 1, 3 do lease.returned[kind] = math.max(lease.returned[kind], ask.returned[kind]) end
end

local function exact(number) return string.format('%.17g', number) end

local function save(state)
  redis.call('SET', KEYS[1], cmsgpack.pack(state), 'EX', ask.keep_s)
end

local function ended(state)
  save(state)
  return {'ended'}
end

local function answer(state, lease, granted, now)
  save(state)
  local reply = {'granted', exact(now)}
  for _, amounts in ipairs({lease.granted, granted, all_open(state)}) do
    for kind = 1, 3 do table.insert(reply, exact(amounts[kind])) end
  end
  table.insert(reply, exact(state.day_tokens))
  table.insert(reply, exact(state.month_tokens))
  for _, cell in ipairs(state.cells) do
    for part = 1, 3 do table.insert(reply, exact(cell[part])) end
  end
  return reply
end

local now = ask.now or server_time()
local packed = redis.call('GET', KEYS[1])
local is_opening = not ask.closing and ask.kind == 'report'
  and ask.spent[1] + ask.spent[2] + ask.returned[1] + ask.returned[2] + ask.returned[3] == 0

local state
if packed then
  state = cmsgpack.unpack(packed)
elseif ask.kind == 'hello' then
  return {'ended'}
elseif not ask.seed then
  -- new here, or Redis lost it: the ledger knows what was used
  return {'unknown', exact(now)}
else
  state = ask.seed
  state.updated_at, state.leases = now, {}
end
-- nothing to end: the tenant is left as it was
if ask.kind == 'hello' and #older_of(state) == 0 then return {'ended'} end
set_back(state, now)
now = advance(state, now)
expire(state, now)

if ask.kind == 'hello' then
  for _, id in ipairs(older_of(state)) do finish(state, id, now) end
  return ended(state)
end

local lease = state.leases[ask.lease]
if lease then
  local is_others = lease.gateway ~= ask.gateway or lease.incarnation ~= ask.incarnation
  if lease.is_over or is_others then return ended(state) end
elseif not is_opening then
  return ended(state)
elseif not ask.is_listed then
  -- the gateway's list of tenants is written first: a lease that is not on it would outlive it
  return {'unlisted', exact(now)}
else
  lease = {
    gateway = ask.gateway, incarnation = ask.incarnation, is_over = false,
    granted = {0, 0, 0}, spent = {0, 0, 0}, returned = {0, 0, 0},
  }
  state.leases[ask.lease] = lease
end
take_in(state, lease, now)
if ask.closing then
  state.leases[ask.lease] = nil
  return ended(state)
end
local granted = grant(state, lease)
lease.expires_at = now + ask.lease_s
return answer(state, lease, granted, now)
