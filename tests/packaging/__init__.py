"""The distribution: it is built, checked, and run with only its declared requirements."""
