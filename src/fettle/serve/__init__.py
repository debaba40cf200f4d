"""Models behind HTTP: the Open Inference Protocol, images, health, metrics, live switches, a prediction log."""
