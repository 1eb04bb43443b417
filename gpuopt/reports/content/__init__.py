"""Report -> the blocks that every human-readable format shows: one file for each thing said."""
