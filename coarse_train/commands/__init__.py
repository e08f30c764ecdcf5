"""What `coarse-train` does beside training: one module for each command, with its options as a dataclass."""
