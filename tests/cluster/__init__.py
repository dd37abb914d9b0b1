"""Places in a job, the pre-flight, and what is asked of SLURM."""
