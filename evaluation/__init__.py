"""Scores of a split: measured, reported, and compared with published numbers."""
