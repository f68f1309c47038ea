"""What people run without the library, restated in plain PyTorch."""
