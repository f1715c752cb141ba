"""Geometry, losses, metrics, settings and files; no module here imports from another package."""
