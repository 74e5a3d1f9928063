"""Tests that run the code of the documentation and compare its texts with the code."""
