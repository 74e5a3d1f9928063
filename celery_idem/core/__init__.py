"""Values and rules: keys, fingerprints, records, the protocol, and their form as bytes.

Never here: input or output, clocks, Celery.
"""

# Modules that the packages above may import; the others are this package's own.
__all__ = [
    "calls", "digests", "errors", "keys", "model", "protocol", "pydantic_models", "record", "results",
    "sealing", "signatures",
]  # fmt: skip
