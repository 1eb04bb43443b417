"""What the machine is and can do: facts, data-sheet ceilings, measured ceilings. Nothing here imports torch until it is asked."""
