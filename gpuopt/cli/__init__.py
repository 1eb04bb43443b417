"""The terminal: text -> Job -> text. A command file parses, calls one function of pipeline/jobs.py, and shows what came back."""
