"""Low-rank training, adaptation, inspection and compression of PyTorch models."""
