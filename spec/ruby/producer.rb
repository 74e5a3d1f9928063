# Producer for celery_idem tasks in Ruby, with its standard library. docs/reference/wire.md explains it.
# Every language hashes the same text. main.rb checks this with vectors.json.
require "digest"
require "json"
require "securerandom"
require "socket"
require "time"
require "uri"

module Producer
  module_function

  Refused = Class.new(StandardError)

  def refuse(why) = raise(Refused, why)
  def list(texts) = "[#{texts.join(",")}]"

  # --- canonical form: from a value to JSON text ------------------------------------------------------

  ESCAPES = { '"' => '\"', "\\" => "\\\\", "\b" => '\b', "\f" => '\f', "\n" => '\n', "\r" => '\r', "\t" => '\t' }.freeze

  def string(text)
    refuse("not valid Unicode") unless text.valid_encoding?
    "\"#{text.gsub(/["\\\x00-\x1f]/) { |one| ESCAPES[one] || format("\\u%04x", one.ord) }}\""
  end

  def normal(text)
    refuse("not valid Unicode") unless text.valid_encoding?
    text.unicode_normalize(:nfc)
  end

  def object(pairs) # each pair: a name and a canonical text
    texts = pairs.to_h
    refuse("two names are the same in normal form") if texts.size < pairs.size
    names = texts.keys.sort_by { |name| name.encode("UTF-16BE").b } # as RFC 8785 says
    "{#{names.map { |name| "#{string(name)}:#{texts[name]}" }.join(",")}}"
  end

  def tagged(tag, text) = object([[tag, string(text)]])

  def canonical(value, depth = 0)
    case value
    when nil then return "null"
    when true, false then return value.to_s
    when String then return string(normal(value))
    when Integer then return number(value, 0)
    when Float then return float(value)
    end
    # kombu's notation for a value that JSON cannot hold.
    type, inner = value.is_a?(Hash) && value.size == 2 ? value.values_at("__type__", "__value__") : nil
    return decimal(inner) if type == "decimal"
    refuse("nested more than 64 levels deep") if depth >= 64
    return list(value.map { |item| canonical(item, depth + 1) }) if value.is_a?(Array)
    return typed(type, inner, depth + 1) if TYPES.include?(type)

    object(value.map do |name, item|
      name = normal(name)
      [name.start_with?("$") ? "$#{name}" : name, canonical(item, depth + 1)]
    end)
  end

  def number(digits, power) # digits × 10 ** power, but not a fraction that a double holds exactly
    return "0" if digits.zero?

    digits, power = digits / 10, power + 1 while (digits % 10).zero?
    whole = (0..15).cover?(power) ? digits * 10**power : nil
    whole && whole.abs < 2**53 ? whole.to_s : tagged("$number", "#{digits}E#{power}")
  end

  def float(value)
    refuse("NaN or infinite") unless value.finite?
    return number(value.to_i, 0) if value == value.to_i

    mantissa, power = value.to_s.split("e").then { |m, p| [m.delete_suffix(".0"), p.to_i] } # the shortest digits
    return mantissa if power.zero?
    return "#{mantissa}e#{power}" if power < -6 # as JavaScript writes it: 0.000001, and 1e-7

    sign, digits = value.negative? ? ["-", mantissa[1..]] : ["", mantissa]
    "#{sign}0.#{"0" * (-power - 1)}#{digits.delete(".")}"
  end

  def decimal(text)
    sign, before, after, power = text.match(/\A([+-]?)(\d+)(?:\.(\d+))?(?:E([+-]?\d+))?\z/i)&.captures
    refuse("not a finite decimal") unless before
    digits = "#{sign}#{before}#{after}".to_i
    power = power.to_i - after.to_s.size
    double = text.to_f
    fraction = power.negative? && double.finite? && double != double.to_i
    fraction && double.to_r == digits * 10r**power ? float(double) : number(digits, power)
  end

  TYPES = %w[datetime date time uuid bytes base64 ip timedelta secret set].freeze # the last four are in no message

  def typed(type, value, depth)
    case type
    when "datetime" then tagged("$datetime", datetime(value))
    when "uuid" then tagged("$uuid", value["hex"].sub(/\A(.{8})(.{4})(.{4})(.{4})/, '\1-\2-\3-\4-'))
    when "bytes" then tagged("$bytes", [value].pack("m0"))
    when "base64" then tagged("$bytes", value)
    when "secret" then tagged("$secret", Digest::SHA256.hexdigest(canonical(value, depth)))
    when "set" then object([["$set", list(value.map { |item| canonical(item, depth) }.uniq.sort_by(&:b))]])
    else tagged("$#{type}", value)
    end
  end

  def datetime(text)
    refuse("not an instant") unless text.match?(/T.*(Z|[+-]\d\d:\d\d)\z/)
    instant = Time.iso8601(text).utc
    instant.strftime(instant.nsec.zero? ? "%Y-%m-%dT%H:%M:%S+00:00" : "%Y-%m-%dT%H:%M:%S.%6N+00:00")
  end

  # --- calls: from arguments to key, fingerprint and headers ------------------------------------------

  def json(value) = value.is_a?(String) ? string(value) : value.to_json
  def label(value) = json(value && normal(value.to_s))

  def bind(call)
    names = call["parameters"].map(&:first)
    defaults = call["parameters"].select { |one| one.size > 1 }.to_h
    { **defaults, **names.zip(call["args"]).first(call["args"].size).to_h, **call["kwargs"] }
  end

  def hashed(call)
    bound = bind(call)
    names = call["idempotency_key"] ? [] : call["intent"] || bound.keys
    fields = object(names.map { |name| [name, canonical(bound.fetch(name))] })
    labels = call.values_at("scope", "occurrence", "idempotency_key").map { |value| label(value) }
    parts = ["1", json(call["namespace"]), json(call["task"]), json(call["intent_version"].to_s), *labels, fields]
    list(call["part_of"] && !call["idempotency_key"] ? [*parts, label(call["part_of"])] : parts)
  end

  def key(call) = "#{call["task"]}:#{Digest::SHA256.hexdigest(hashed(call))[0, 32]}"

  def fingerprint(call)
    bound = bind(call)
    names = call["idempotency_key"] ? bound.keys : call["must_match"] || []
    names.sort.map do |name| # Ruby sorts by code points
      parts = ["1", json(call["task"]), json(name)]
      value = list([*parts, canonical(bound[name])])
      Digest::SHA256.hexdigest(list(parts))[0, 8] + Digest::SHA256.hexdigest(value)[0, 16]
    end.join
  end

  def scope_digest(call)
    scope = call["scope"] or return ""
    Digest::SHA256.hexdigest(list(["1", json(call["namespace"]), label(scope)]))[0, 32]
  end

  LABELS = { "idem-scope" => "scope", "idem-occurrence" => "occurrence",
             "idempotency-key" => "idempotency_key", "idem-part-of" => "part_of" }.freeze

  def headers(call, message)
    found = call.key?("intent") ? { "idem-key" => key(call) } : {} # without it the worker derives the key
    LABELS.each { |name, option| found[name] = normal(call[option].to_s) if call[option] }
    found.empty? ? found : { **found, "idem-message" => message }
  end

  # --- Celery's message on a Redis broker -------------------------------------------------------------

  def publish(url, call, queue = "celery")
    id = SecureRandom.uuid
    message = {
      "body" => [JSON.generate([call["args"], call["kwargs"], {}])].pack("m0"),
      "content-type" => "application/json",
      "content-encoding" => "utf-8",
      "headers" => { "task" => call["task"], "id" => id, "root_id" => id, "lang" => "rb", **headers(call, id) },
      "properties" => {
        "correlation_id" => id,
        "body_encoding" => "base64",
        "delivery_info" => { "exchange" => "", "routing_key" => queue },
        "delivery_tag" => SecureRandom.uuid,
      },
    }
    redis(url, "LPUSH", queue, JSON.generate(message))
    id
  end

  def redis(url, *command)
    at = URI(url)
    database = at.path.to_s.delete("/")
    commands = [["SELECT", database.empty? ? "0" : database], command]
    commands.unshift(["AUTH", at.user.to_s.empty? ? "default" : at.user, plain(at.password)]) if at.password
    Socket.tcp(at.host, at.port || 6379) { |socket| commands.map { |words| reply(socket, words) }.last }
  end

  def plain(text) = URI.decode_www_form_component(text.gsub("+", "%2B"))

  def reply(socket, words)
    socket.write("*#{words.size}\r\n", *words.map { |word| "$#{word.bytesize}\r\n#{word}\r\n" })
    line = socket.gets("\r\n")&.chomp or raise("Redis closed the connection")
    raise(line) if line.start_with?("-")
    return line unless line.start_with?("$")

    line == "$-1" ? nil : socket.read(line[1..].to_i + 2)[..-3]
  end
end
