"""Fast paths for the machine at hand, each equal to a definition in PyTorch."""
