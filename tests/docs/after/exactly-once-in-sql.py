# ruff: noqa: F821
assert [book.delay("c1", "i1").get(timeout=20) for _ in range(2)] == [{"booking": 1}] * 2
with Session(engine) as session:
    assert session.query(Booking).count() == 1
