"""A module, or a pipeline of modules, of the caller's process -> the same with the winner of a search in its place (`gpuopt.optimize`).

- A module: `searched.optimized`, over children where `handed` can give them the module, else over `local` in this process; `standin` is what is called in its place.
- A pipeline: `whole.optimized`, with the calls that one run makes of each module (`overheard`, `calls`) and how far the answers of two runs are apart (`answers`).
"""
