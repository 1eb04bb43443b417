"""A Job with `search` -> Report (`gpuopt optimize`): what is tried next, decided by a pure strategy; and the children that try it.

- Entry: `optimize.optimize(job)`, the loop between the two; `live/`: the same for a module or a whole pipeline of the caller's process (`gpuopt.optimize`).
- Strategy, no clock, file or process: `strategy` (the order of its phases: `screening`, `climb`, `remedies`, `batches`, `verdict`), the space it chooses from (`tune`)
  and what it expects there (`predict`), what it knows (`books`), its account in the end (`account`, `frontier`). It asks in the values of `questions`.
- Work, what answers them: `crew` (who holds which candidate) with `ahead` (who builds beside the one that is tried), `trying`, `explaining`, `race`; `journal` and
  `published` keep the answers and the winner.
"""
