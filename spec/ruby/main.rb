#   ruby main.rb check ../vectors.json                   compares every vector
#   ruby main.rb keys < calls                            a call in each line: prints its key and fingerprint
#   ruby main.rb publish redis://host:6379/0 < calls     publishes them, and prints the messages' ids
#   ruby main.rb look redis://host:6379/0 idem:KEY       prints the record of an action, or null
require_relative "producer"
require_relative "record"

def parse(text) = large(JSON.parse(text, max_nesting: false))

def large(value) # reads marked integers, which are too large for JSON in some languages
  case value
  when Array then value.map { |item| large(item) }
  when Hash then value["__type__"] == "int" ? value["__value__"].to_i : value.transform_values { |item| large(item) }
  else value
  end
end

def attempt
  yield
rescue Producer::Refused, JSON::ParserError => error
  "refused: #{error.message}"
end

def look(url, name)
  value = Producer.redis(url, "GET", name)
  value && Record.unpack(value[8..], value.unpack1("Q>"))
end

def check(file)
  vectors = parse(File.read(file))
  results = [] # each: name, value found, value expected
  vectors["values"].each { |one| results << [one["name"], attempt { Producer.canonical(one["value"]) }, one["canonical"]] }
  vectors["refused"].each { |one| results << [one["name"], attempt { Producer.canonical(parse(one["json"])) }[0, 8], "refused:"] }
  vectors["calls"].each do |one|
    %w[hashed key fingerprint scope_digest].each { |what| results << ["#{one["name"]}: #{what}", Producer.send(what, one), one[what]] }
    results << ["#{one["name"]}: headers", Producer.headers(one, vectors["message"]), one["headers"]]
  end
  vectors["records"].each { |one| results << [one["name"], Record.unpack([one["packed"]].pack("H*"), one["stamp"]), one["record"]] }
  failures = results.reject { |_, found, expected| found == expected }
  failures.each { |name, found, expected| warn "#{name}:\n  #{found}\n  #{expected}" }
  puts "#{vectors.values_at("values", "refused", "calls", "records").sum(&:size)} vectors, #{failures.size} failures"
  exit failures.empty?
end

$stdout.sync = true
case ARGV.shift
when "check" then check(ARGV[0])
when "look" then puts JSON.generate(look(*ARGV))
when "keys" then $stdin.each_line { |line| puts(attempt { (call = parse(line)) && "#{Producer.key(call)} #{Producer.fingerprint(call)}" }) }
when "publish" then $stdin.each_line { |line| puts Producer.publish(ARGV[0], parse(line), *ARGV[1..]) }
end
