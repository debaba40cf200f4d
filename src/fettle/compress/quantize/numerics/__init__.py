"""Uniform affine quantization as arithmetic on tensors; knows nothing of graphs."""
