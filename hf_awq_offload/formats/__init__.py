"""States what packed integers, words and config entries mean: pure functions and records, no files, no modules."""
