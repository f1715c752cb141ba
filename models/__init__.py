"""The network, its parts, and its files."""
