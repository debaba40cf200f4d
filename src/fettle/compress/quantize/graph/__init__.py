"""Passes over a captured graph: fold batch-norm, decide where to quantize, put the quantizers in."""
