"""Drift tests, one file each, found by file name. The base class is in `_base.py`."""
