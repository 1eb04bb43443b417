"""Twenty architectures at their published sizes, each with its recipe: `python -m recipes.zoo.run` measures them, `python -m recipes.zoo.table` writes docs/zoo.md."""
