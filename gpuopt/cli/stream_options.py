"""Options of `gpuopt stream`: what, within which budget, on which device."""

from __future__ import annotations

from typing import Annotated

import typer

from gpuopt.cli.options import BUILD, INPUTS, MEASURE, MODEL_HELP, OUTPUT, _option
from gpuopt.core.streamed import RIVALS

STREAM = "Streaming"

ActionArg = Annotated[str, typer.Argument(metavar="plan|run|bench|verify|pack", help="What to do; see above.", show_default=False)]
StreamModelArg = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
BudgetOpt = Annotated[
    list[str] | None,
    _option(
        "--budget",
        metavar="8GiB|50%",
        help="8GiB is all that the process takes on the device: context, workspaces, cache and activations too. 50% is of the weights' bytes that are on the device at once, "
        "and what a call needs comes on top. Repeatable for plan and bench: a frontier.",
        panel=STREAM,
    ),
]
PinLimitOpt = Annotated[
    str | None,
    _option("--pin-limit", metavar="SIZE", help="Lock at most this much host memory. Default 80% of what is available.", panel=STREAM),
]
DiskOpt = Annotated[
    str | None,
    _option(
        "--disk",
        metavar="FOLDER",
        help="A folder written by pack: weights beyond host memory are read from it. Of pack: where to write.",
        panel=STREAM,
    ),
]
SlotsOpt = Annotated[
    int | None,
    _option(
        "--slots",
        help="Buffers that streamed blocks take turns in. Default: the better of 2 and 3; 1 overlaps nothing.",
        panel=STREAM,
        min=1,
        max=3,
    ),
]
GranularityOpt = Annotated[
    str,
    _option(
        "--granularity",
        metavar="block|sub",
        help="What is copied at once: a block, or attention and MLP apart, which halves a slot and the smallest budget.",
        panel=STREAM,
        show_default=True,
    ),
]
EmbedOpt = Annotated[
    str,
    _option("--embed", metavar="device|cpu", help="cpu gathers an embedding's rows on the host, exactly.", panel=STREAM, show_default=True),
]
GraphsOpt = Annotated[
    bool,
    _option(
        "--graphs",
        help="A CUDA graph of each block, on the addresses of its weights; copies stay outside. The same bits, with less of the host. A block that cannot have one (it is called "
        "with a cache object) runs without, and a note says which and why. With --compile, of the compiled block.",
        panel=STREAM,
    ),
]
CompileOpt = Annotated[bool, _option("--compile", help="torch.compile each block after it is bound.", panel=STREAM)]
OnceOpt = Annotated[
    bool, _option("--once", help="A single forward: the first blocks are resident, and nothing is copied for the next one.", panel=STREAM)
]
ElasticOpt = Annotated[bool, _option("--elastic", help="Out of device memory: once more with fewer residents.", panel=STREAM)]
StreamDeviceOpt = Annotated[
    str,
    _option(
        "--device",
        "-d",
        metavar="auto|cuda[:N]|simulated[:K=V,…]",
        help="simulated needs no GPU: bytes are real, times are arithmetic, by the rates of an H200 or those given, as in "
        "simulated:link=25e9,block=0.5ms; also pageable, disk, memory (bytes/s), flops, outside, activations, context, schedule, seed.",
        panel=BUILD,
    ),
]
StreamGenerateOpt = Annotated[
    int | None,
    _option(
        "--generate",
        metavar="N",
        help="Greedy generation of N tokens after each prompt (--dim S=128 is its length): each token's forward is timed. Without it, a call is one forward.",
        panel=INPUTS,
        min=2,
    ),
]
CallsOpt = Annotated[int, _option("--calls", help="Forwards timed, after warming up.", panel=MEASURE, min=1, show_default=True)]
ForwardsOpt = Annotated[
    int, _option("--forwards", help="Of verify: forwards of the hunt for races.", panel=MEASURE, min=1, show_default=True)
]
RivalOpt = Annotated[
    list[str] | None,
    _option(
        "--rival",
        metavar="|".join([*RIVALS, "none"]),
        help="Of bench, repeatable: other libraries to time it in turns with, at the same bytes of weights on the device (diffusers cannot be told any). accelerate is its "
        "device_map as shipped; accelerate-pinned its dispatch_model with locked weights and a map that uses up the budget. resident is plain eager in a second process, where everything fits: how far two processes differ. Default: accelerate.",
        panel=MEASURE,
    ),
]
AloneOpt = Annotated[bool, _option("--alone", help="Of bench: without everything resident and other libraries beside it.", panel=MEASURE)]
PackOutputOpt = Annotated[
    str | None, _option("--output", "-o", metavar="FOLDER", help="Of pack: where to write; the same as --disk.", panel=OUTPUT)
]
