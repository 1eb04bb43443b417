"""A user's own program, observed while it runs -> core/script.py's values. Runs inside their process, so it needs torch and nothing else."""
