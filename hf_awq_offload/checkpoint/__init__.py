"""Checkpoints on the disk: reading headers, checking layouts, writing files that survive a crash."""
