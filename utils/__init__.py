"""Geometry, losses, metrics, options and records; nothing here imports from models or dataset."""
