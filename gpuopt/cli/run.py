"""`gpuopt run RECIPE`: a file -> the command it describes."""

from __future__ import annotations

from pathlib import Path

from gpuopt.cli import options as o


def run(
    recipe: o.RecipeArg,
    device: o.MaybeDeviceOpt = None,
    output: o.MaybeOutputOpt = None,
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
    quiet: o.QuietOpt = False,
    no_input: o.NoInputOpt = False,
) -> int:
    """Do what a recipe says: a whole command as a YAML file, for what is run again and again.

    docs/recipes.md describes its keys; a key it does not know, or a value that cannot be meant, is refused with its line.

    Example: gpuopt run recipes/resnet101/recipe.yaml --json here.json
    """
    from gpuopt.cli import request as r
    from gpuopt.cli import show
    from gpuopt.pipeline import jobs, optimize, streaming
    from gpuopt.pipeline import recipe as recipes

    job = recipes.read(Path(recipe), device=device, output=output, force=force, command=r.command_line())

    verbs = {
        "profile": jobs.profile,
        "bench": jobs.bench,
        "optimize": optimize.optimize,
        "stream": streaming.stream,
        "convert": jobs.convert,
        "compile": jobs.compile,
        "backends": jobs.backends,
        "device": jobs.device,
    }
    return show.run(job, verbs[job.verb], json=json, quiet=quiet, force=force, ask=not no_input)
