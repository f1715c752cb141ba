"""Experiments that docs/experiments.md reports, and what they need besides the project itself."""
