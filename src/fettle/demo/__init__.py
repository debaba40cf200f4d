"""The demonstration: a project on scikit-learn's handwritten digits, and the loop around it."""
