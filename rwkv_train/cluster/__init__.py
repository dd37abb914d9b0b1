"""The job that a run is part of: the rank of a process, what must agree between nodes, requeueing, sweeps."""
