-- wrk: each thread sends the bodies of a file in turn, each behind its length; at the end one line of JSON.
-- usage: wrk ... -s rotate.lua URL -- BODIES [NAME VALUE]...

local requests, turn = {}, 0

function init(arguments)
  wrk.method = "POST"
  for index = 2, #arguments, 2 do
    wrk.headers[arguments[index]] = arguments[index + 1]
  end
  local file = assert(io.open(arguments[1], "rb"))
  while true do
    local size = file:read(4)
    if not size then break end
    local a, b, c, d = size:byte(1, 4)
    requests[#requests + 1] = wrk.format(nil, nil, nil, file:read(((a * 256 + b) * 256 + c) * 256 + d))
  end
  file:close()
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '{"duration_us":%d,"requests":%d,"p50_us":%d,"p99_us":%d,"refused":%d,"broken":%d}\n',
    summary.duration, summary.requests, latency:percentile(50), latency:percentile(99),
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
