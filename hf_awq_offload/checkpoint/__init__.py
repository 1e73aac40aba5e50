"""Checkpoints on disk: reads headers, checks layouts, writes files that survive a crash."""
