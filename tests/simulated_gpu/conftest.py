"""Keeps ordinary pytest runs out of the tests that need the simulated GPU; test_on_simulated_gpu.py runs them."""

import simulated_gpu

collect_ignore = [] if simulated_gpu.is_active() else ["inside"]
