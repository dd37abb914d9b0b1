"""The framework on a real SLURM: `make test-slurm`."""
