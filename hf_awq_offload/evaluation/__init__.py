"""Sends held-out text through a model and its original, one decoder layer of each at a time, and compares them."""
