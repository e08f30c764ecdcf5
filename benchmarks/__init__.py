"""Speed and memory of `coarse_kernels` against the plain PyTorch that people would write instead. See README.md."""
