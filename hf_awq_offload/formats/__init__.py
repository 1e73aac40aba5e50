"""What packed integers, words and config entries mean. Pure functions and records; no file, no module."""
