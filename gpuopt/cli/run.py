"""`gpuopt run RECIPE`: a file -> the command it describes."""

from __future__ import annotations

from pathlib import Path

from gpuopt.cli import options as o


def run(
    recipes: o.RecipesArg,
    device: o.MaybeDeviceOpt = None,
    output: o.MaybeOutputOpt = None,
    json: o.RecipeJsonOpt = None,
    force: o.ForceOpt = False,
    quiet: o.QuietOpt = False,
    no_input: o.NoInputOpt = False,
) -> int:
    """Do what a recipe says: a whole command as a YAML file, for what is run again and again.

    docs/recipes.md describes its keys; a key it does not know, or a value that cannot be meant, is refused with its line.

    Several recipes of the verb bench are one command: the machine is looked at once, and on a GPU the next one's candidates are built while one's are built and timed.

    Example: gpuopt run recipes/resnet101/recipe.yaml --json here.json

    Example: gpuopt run recipes/zoo/*.yaml --json zoo/
    """
    from gpuopt.cli import request as r
    from gpuopt.cli import show
    from gpuopt.pipeline import jobs
    from gpuopt.pipeline import recipe as reader
    from gpuopt.pipeline.search import optimize
    from gpuopt.pipeline.streamed import command

    read = [reader.read(Path(name), device=device, output=output, force=force, command=r.command_line()) for name in recipes]
    if len(read) > 1:
        return show.run_all([Path(name) for name in recipes], read, jobs.bench_all, folder=json, quiet=quiet, force=force)
    (job,) = read

    verbs = {
        "profile": jobs.profile,
        "bench": jobs.bench,
        "optimize": optimize.optimize,
        "stream": command.stream,
        "convert": jobs.convert,
        "compile": jobs.compile,
        "backends": jobs.backends,
        "device": jobs.device,
    }
    return show.run(job, verbs[job.verb], json=json, quiet=quiet, force=force, ask=not no_input)
