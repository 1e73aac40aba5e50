"""Pure functions that search for scales, clipping ranges and codes from a weight and its input statistics.

Nothing here knows about modules, models or files.
"""
