"""Files to pixels and back: what a file is, windows of it, its place on the ground, and writing."""
