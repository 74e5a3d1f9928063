"""What is shipped: built, checked, and installed into an empty environment."""
