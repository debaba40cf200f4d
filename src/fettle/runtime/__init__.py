"""Engines that run a model: `export` and `load` of each in one file, found by its name."""
