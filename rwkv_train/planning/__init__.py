"""What a run needs before it is started: memory per rank, FLOPs, time, network, and the smallest change that fits.

cards.py: data sheets of devices; model.py: counts of one model; memory.py, speed.py and goodput.py: the formulas;
plan.py: what fits; report.py: the table and the JSON. The same formulas choose strategy=auto, and refuse what cannot
fit.
"""
