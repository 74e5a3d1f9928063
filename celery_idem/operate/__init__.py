"""For operators and monitoring: the operator API, doctor, audit, copying.

Never here: rules, and calls of a driver.
"""

# Modules that the packages above may import; the others are this package's own.
__all__ = ["audit", "background", "bulk", "copying", "doctor", "operators", "retrying"]
