"""The documentation, executed: what a page says is what happens."""
