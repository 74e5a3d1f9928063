"""Helpers of the tests: real servers, real workers, and counts of effects at their destination."""
