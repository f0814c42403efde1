"""Builds the parity fixtures under tests/golden/parity (see tests/README.md)."""
