# Reads the record of an action from the bytes in a store. docs/explanation/record.md explains it.
class Record
  STATES = [nil, "running", "scheduled", "released", "succeeded", "failed", "in_doubt", "cancelled", "accepted"].freeze

  def self.unpack(packed, stamp) = new(packed).read(stamp)

  def initialize(packed)
    @rest = packed.b
  end

  PARTS = [ # bit, name, method that reads it
    [0, "lease", :time], [1, "task_id", :uuid], [2, "task_id", :text], [3, "fingerprint", :blob],
    [4, "steps", :steps], [5, "open_steps", :texts], [6, "asking", :token], [7, "reason", :text],
    [8, "notes", :notes], [9, "digests", :blob], [12, "noticed", :noticed], [13, "scope", :digest],
    [15, nil, :open], [14, "replaced_by", :text], [10, "missing", :text], [11, "payload", :rest]
  ].freeze

  def read(stamp)
    owner, version, state, bits, attempts, crashes, fence = take(27).unpack("a12CCnnCQ>")
    raise "format version #{version}" unless version == 2

    found = { "state" => STATES.fetch(state), "owner" => owner.unpack1("H*"), "attempts" => attempts,
              "crashes" => crashes, "fence" => fence.zero? ? stamp : fence }
    PARTS.each { |bit, name, what| found.merge!(name ? { name => send(what) } : send(what)) if bits[bit] == 1 }
    found
  end

  private

  def take(size)
    raise "cut short" if size > @rest.bytesize

    @rest.slice!(0, size)
  end

  def time = take(8).unpack1("Q>")
  def count = take(4).unpack1("N")
  def hex(size) = take(size).unpack1("H*")
  def uuid = hex(16).sub(/\A(.{8})(.{4})(.{4})(.{4})/, '\1-\2-\3-\4-')
  def text = take(count).force_encoding("UTF-8")
  def blob = hex(count)
  def many = Array.new(count) { yield }
  def texts = many { text }
  def steps = many { { "name" => text, "payload" => blob } }
  def token = hex(12)
  def digest = hex(16)
  def noticed = { "at" => time, "stamp" => time }
  def rest = hex(@rest.bytesize)
  def open = { "recovery" => { "tries" => take(1).ord, "wait" => time }, "place" => text, "call" => blob }

  def notes
    many do
      { "at" => time, "by" => text, "what" => text, "evidence" => text,
        "would" => take(1).ord.then { |one| one.zero? ? nil : one }, "differs" => texts }
    end
  end
end
