"""fettle: from a trained PyTorch model to a small, fast, watched service. Importing it does not import torch."""
