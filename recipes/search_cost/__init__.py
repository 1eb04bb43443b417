"""What a search costs beside measuring everything: `run.py` measures whole spaces, `replay.py` replays the search on the records, `table.py` writes docs/search_cost.md."""
