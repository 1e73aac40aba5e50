"""Keeps weights, hidden states and results where there is room; brings one decoder layer to the device and back."""
