"""The job that a run is part of: where a process stands in it, what must agree between nodes, how it comes back."""
