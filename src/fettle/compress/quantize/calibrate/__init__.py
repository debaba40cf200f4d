"""Observers: from a stream of activations to a range. One file each, found by its name."""
