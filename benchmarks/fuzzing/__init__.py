"""What `fuzz.py` and `sweep.py` share: a server that forks, mutants of every format, and a judge of what became of each."""
