"""Ranks in a job, the preflight, and requests to SLURM."""
