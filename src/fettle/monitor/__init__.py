"""Watching a served model: the prediction log in, a verdict and an incident out. Imports no torch."""
