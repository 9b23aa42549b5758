"""Benchmarks, one file per claim: `run()` gives rows {name, value, unit, ratio}; ratios are within one run."""
