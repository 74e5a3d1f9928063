"""The distribution: it is built and checked, and it works without other packages."""
