"""`rwkv-train report`: the records of runs as one self-contained HTML file, served live, or as PNG files."""
