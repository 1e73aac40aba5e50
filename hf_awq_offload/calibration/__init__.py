"""Turns calibration data of any form into the statistics of each linear's input."""
