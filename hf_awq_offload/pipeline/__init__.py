"""Runs the one loop over decoder layers (loop.py) and what it does to each of them."""
