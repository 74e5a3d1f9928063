"""The wire format for producers in other languages: test vectors, and two producers that pass them."""
