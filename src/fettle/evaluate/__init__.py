"""Proves what a compression cost and won: metric, latency, size, parity, and their comparison.

measure   metric.py, latency.py (cuda_timing.py), footprint.py, parity.py, paired.py -> measurements
decide    pareto.py, choose.py over the values of comparison.py
show      table.py, html.py (figures.py, page.py), in the words of wording.py

intervals.py holds the statistics that several of them share. Imports core and runtime, never a sibling stage.
"""
