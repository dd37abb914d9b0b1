"""`rwkv-train report`: what a run left behind, as one HTML file that needs nothing else."""
