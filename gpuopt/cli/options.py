"""Options that several commands share, each declared once: name, help, panel."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gpuopt.converters.rewrites import REWRITES

MODEL = "Model"
INPUTS = "Inputs"
BUILD = "What to build"
MEASURE = "Measuring"
RIGHT = "Is it still right"
GATES = "Gates (missed: exit 1)"
DOCTOR = "Rules"
OUTPUT = "Output"


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=more.pop("show_default", False), **more)


MODEL_HELP = "A model file (.pt .pt2 .safetensors .onnx), a transformers folder or hf:ID@REVISION, package.module:factory, file.py:factory, or a bundle."

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
ModelsArg = Annotated[list[str], typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
MaybeModelArg = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]

ProgramArg = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- python SCRIPT ARGS", help="Or a program of yours, run once as it stands.", show_default=False),
]
TraceOpt = Annotated[
    str | None,
    _option(
        "--trace", metavar="FILE", help="Explain a torch.profiler trace (.json, .json.gz) from elsewhere, without its model.", panel=MODEL
    ),
]
TraceLimitOpt = Annotated[
    str | None,
    _option("--trace-limit", metavar="SIZE", help="Of --trace: read files of at most this much JSON, inflated; 4GiB.", panel=MODEL),
]
TraceEventsOpt = Annotated[
    int | None,
    _option(
        "--trace-events", metavar="N", help="Of --trace: keep at most this many ops, launches and kernels; 4000000.", panel=MODEL, min=1
    ),
]
SaveInputsOpt = Annotated[
    str | None,
    _option(
        "--save-inputs", metavar="FOLDER", help="Of a program: keep the tensors of each model's first call, for --inputs.", panel=INPUTS
    ),
]
NoTraceOpt = Annotated[bool, _option("--no-trace", help="Of a program: observe it without torch.profiler.", panel=MEASURE)]
ArchOpt = Annotated[
    str | None, _option("--arch", metavar="PKG.MOD:FACTORY", help="Builds the module for a file of bare tensors.", panel=MODEL)
]
TrustOpt = Annotated[
    list[str] | None,
    _option("--trust", metavar="SHA256|PATH", help="Let this file's code run, for this command alone. Repeatable.", panel=MODEL),
]
RemoteCodeOpt = Annotated[
    bool, _option("--trust-remote-code", help="Let a transformers folder's own code run; needs a pinned revision.", panel=MODEL)
]
CastOpt = Annotated[bool, _option("--cast", help="Allow weights of another dtype than the parameters they go into.", panel=MODEL)]
NonfiniteOpt = Annotated[bool, _option("--allow-nonfinite", help="Allow NaN or Inf in the weights.", panel=MODEL)]

InputOpt = Annotated[
    list[str] | None,
    _option(
        "--input",
        "-i",
        metavar="NAME:DTYPE[DIMS]",
        help="One input, as in 'x:float16[N,3,224,224]'; a letter is a free dimension; 'ids:int64[N,S]<30522' draws below 30522. Repeatable.",
        panel=INPUTS,
    ),
]
InputsOpt = Annotated[
    str | None,
    _option("--inputs", metavar="FILE", help=".npz or .safetensors with one array an input, instead of random data.", panel=INPUTS),
]
BatchOpt = Annotated[str | None, _option("--batch", metavar="1,8,64", help="Values of the free dimension N.", panel=INPUTS)]
DimOpt = Annotated[
    list[str] | None,
    _option("--dim", metavar="NAME=VALUES", help="S=128,512 for several, S=1:128:512 for min, usual and max. Repeatable.", panel=INPUTS),
]
SeedOpt = Annotated[int, _option("--seed", help="Of random inputs.", panel=INPUTS, show_default=True, min=0)]
InputModeOpt = Annotated[
    str,
    _option(
        "--input-mode",
        metavar="device|host|overlapped",
        help="Inputs already on the device, copied in (and outputs out) by each call, or the next call's copied meanwhile; several with commas.",
        panel=INPUTS,
        show_default=True,
    ),
]

BackendOpt = Annotated[
    str | None,
    _option("--backend", "-b", metavar="NAME[:PRESET]", help="eager, inductor, ort, trt …; gpuopt backends lists them.", panel=BUILD),
]
BackendsOpt = Annotated[
    list[str] | None,
    _option(
        "--backend",
        "-b",
        metavar="NAME[:PRESET]",
        help="eager, inductor:max-autotune, ort …; gpuopt backends lists them. Repeatable: they are timed interleaved.",
        panel=BUILD,
    ),
]
PresetOpt = Annotated[str | None, _option("--preset", metavar="NAME", help="A named set of the backend's options.", panel=BUILD)]
OptionOpt = Annotated[
    list[str] | None, _option("--option", metavar="KEY=VALUE", help="One option of the backend. Repeatable.", panel=BUILD)
]
PrecisionOpt = Annotated[
    str | None,
    _option("--precision", "-p", metavar="fp32|tf32|bf16|fp16|fp8…", help="What to compute in; without it, the model's own.", panel=BUILD),
]
PrecisionsOpt = Annotated[
    list[str] | None,
    _option(
        "--precision",
        "-p",
        metavar="fp32|tf32|bf16|fp16|fp8…",
        help="What to compute in; without it, the model's own. Repeatable.",
        panel=BUILD,
    ),
]
ChannelsLastOpt = Annotated[bool, _option("--channels-last", help="Lay images out channels last.", panel=BUILD)]
FoldOpt = Annotated[bool, _option("--fold-bn", help="Fold batch norms into the convolutions before them.", panel=BUILD)]
RewriteOpt = Annotated[
    list[str] | None,
    _option(
        "--rewrite",
        metavar="NAME[:SETTING]",
        help=f"Change the model's own code before the backend sees it: {', '.join(REWRITES)}. Verified like a backend. Repeatable, made in this order.",
        panel=BUILD,
    ),
]
KeepOpt = Annotated[
    list[str] | None,
    _option("--keep-fp32", metavar="MODULE", help="Leave this module in fp32 when the rest is cast. Repeatable.", panel=BUILD),
]
DeviceOpt = Annotated[
    str, _option("--device", "-d", metavar="auto|cpu|cuda[:N]", help="auto is cuda where there is one, else cpu.", panel=BUILD)
]
DevicesOpt = Annotated[
    str,
    _option(
        "--device",
        "-d",
        metavar="auto|cpu|cuda[:N],…",
        help="auto is cuda where there is one, else cpu. Several, as in cpu,cuda, are compared over batch: who wins from which batch on, and why.",
        panel=BUILD,
    ),
]
BuildOnlyOpt = Annotated[
    bool, _option("--build-only", help="Build without running: for a GPU that is not here. The bundle says verified: false.", panel=BUILD)
]

GenerateOpt = Annotated[
    int | None,
    _option(
        "--generate",
        metavar="N",
        help="Time the greedy generation of N tokens after each prompt (--dim S=128 is its length), not single calls.",
        panel=MEASURE,
        min=2,
    ),
]
MinTimeOpt = Annotated[
    str | None,
    _option("--min-time", metavar="TIME", help="Time each candidate at least this long, as in 500ms, 2s. Default 1s.", panel=MEASURE),
]
MaxTimeOpt = Annotated[str | None, _option("--max-time", metavar="TIME", help="And at most this long. Default 20s.", panel=MEASURE)]
PairsOpt = Annotated[
    int | None, _option("--pairs", help="Interleaved blocks a side when candidates are compared. Default 20.", panel=MEASURE)
]
BuildJobsOpt = Annotated[
    int | None,
    _option(
        "--build-jobs",
        help="Candidates built at once; nobody builds while one is timed. Default: 1; up to 4 where optimize runs on a GPU.",
        panel=MEASURE,
        min=1,
    ),
]
SustainedOpt = Annotated[
    str,
    _option(
        "--sustained",
        metavar="auto|on|off",
        help="Time products between the candidates: the ceiling under the same heat and power. auto: on GPUs.",
        panel=MEASURE,
        show_default=True,
    ),
]
TimeoutOpt = Annotated[
    str | None, _option("--timeout", metavar="TIME", help="Kill a candidate whose single step takes longer. Default 30min.", panel=MEASURE)
]

VerifyOpt = Annotated[
    str,
    _option(
        "--verify",
        metavar="full|precision|off",
        help="full compares in fp32 first, then in the precision asked for.",
        panel=RIGHT,
        show_default=True,
    ),
]
MaxErrorOpt = Annotated[
    float | None, _option("--max-error", help="Largest relative RMSE of any output against the fp64 reference.", panel=RIGHT, min=0.0)
]
ToleranceOpt = Annotated[
    float | None,
    _option(
        "--tolerance",
        metavar="RATIO",
        help="A candidate's error may be this many times eager's at the same precision. Default 3.",
        panel=RIGHT,
    ),
]
EvalDataOpt = Annotated[
    str | None,
    _option(
        "--eval-data",
        metavar="FILE",
        help=".npz or .safetensors of real samples, one array an input: more inputs for the check, and what --metric is computed on. Other arrays are targets.",
        panel=RIGHT,
    ),
]
MetricOpt = Annotated[
    str | None,
    _option(
        "--metric",
        metavar="PKG.MOD:FN|FILE.py:FN",
        help="Your own score, fn(outputs, batch) or fn(outputs, targets): a candidate must keep --min-metric-ratio of what eager scores.",
        panel=RIGHT,
    ),
]
MinMetricRatioOpt = Annotated[
    float | None,
    _option("--min-metric-ratio", metavar="SHARE", help="Of --metric: the share of eager's score to keep. Default 0.99.", panel=RIGHT),
]
LowerIsBetterOpt = Annotated[bool, _option("--metric-lower-is-better", help="Of --metric: it is a loss, or a rate of errors.", panel=RIGHT)]
CalibOpt = Annotated[
    str | None, _option("--calib", metavar="FILE", help="Further real inputs for the check, in the form of --eval-data.", panel=RIGHT)
]
AllowInaccurateOpt = Annotated[bool, _option("--allow-inaccurate", help="Write the result even if it failed verification.", panel=RIGHT)]

MinTflopsOpt = Annotated[float | None, _option("--min-tflops", help="Least TFLOP/s of every run.", panel=GATES)]
MaxLatencyOpt = Annotated[str | None, _option("--max-latency", metavar="TIME", help="Longest median a call, as in 15ms.", panel=GATES)]
BaselineOpt = Annotated[str | None, _option("--baseline", metavar="FILE", help="An earlier report to compare with.", panel=GATES)]
MaxSlowdownOpt = Annotated[
    str | None,
    _option("--max-slowdown", metavar="PERCENT", help="Against the baseline, or the run before, as in 5%. Default 5%.", panel=GATES),
]
InconclusiveOpt = Annotated[
    bool, _option("--allow-inconclusive", help="A comparison too noisy to decide, or of unlike things, does not fail.", panel=GATES)
]
StrictOpt = Annotated[bool, _option("--strict", help="Any candidate without a result fails, not only all of them.", panel=GATES)]

IgnoreOpt = Annotated[
    list[str] | None,
    _option(
        "--ignore",
        metavar="CODE|NAME",
        help="Leave this rule out, as in GPU307. Repeatable; `ignore` in gpuopt.toml, or under tool.gpuopt in pyproject.toml, lists more.",
        panel=DOCTOR,
    ),
]
FixOpt = Annotated[
    bool, _option("--fix", help="Make the changes that keep results by their nature, and measure what each gives back.", panel=DOCTOR)
]
UnsafeFixesOpt = Annotated[
    bool, _option("--unsafe-fixes", help="With --fix: also those that may change results. Verified all the same.", panel=DOCTOR)
]
FailOnOpt = Annotated[
    str | None, _option("--fail-on", metavar="error|warning|info", help="Exit 1 for findings this bad or worse.", panel=GATES)
]
ExplainOpt = Annotated[
    str | None, _option("--explain", metavar="CODE|NAME|all", help="The page of a rule, and nothing else.", panel=DOCTOR)
]
JsonOpt = Annotated[
    str | None,
    _option("--json", metavar="FILE|-", help="Also write the whole report as JSON; - writes nothing else to stdout.", panel=OUTPUT),
]
ForceOpt = Annotated[bool, _option("--force", "-f", help="Replace an output that is already there.", panel=OUTPUT)]
QuietOpt = Annotated[bool, _option("--quiet", "-q", help="No progress; warnings stay.", panel=OUTPUT)]
NoInputOpt = Annotated[bool, _option("--no-input", help="Never ask, even at a terminal.", panel=OUTPUT)]
DepthOpt = Annotated[int, _option("--depth", help="Levels of the module tree.", panel=OUTPUT, show_default=True, min=0)]
TopOpt = Annotated[int, _option("--top", help="Ops, kernels and lines shown.", panel=OUTPUT, show_default=True, min=1)]
ByOpt = Annotated[
    str,
    _option(
        "--by",
        metavar="module|op|kernel|line|all",
        help="Tell the time by this alone. Without it: the modules, and the ops of layers alike.",
        panel=OUTPUT,
    ),
]
SortOpt = Annotated[
    str,
    _option(
        "--sort",
        metavar="time|gap|flops|bytes",
        help="Order of ops, kernels and lines; gap is the time above the roofline.",
        panel=OUTPUT,
        show_default=True,
    ),
]

ToOpt = Annotated[
    str | None,
    _option("--to", metavar="onnx|pt2|safetensors", help="The form to write; without it, the output's suffix says so.", panel=OUTPUT),
]
OutputFileOpt = Annotated[str, _option("--output", "-o", metavar="FILE", help="The file to write.", panel=OUTPUT)]
OutputFolderOpt = Annotated[str, _option("--output", "-o", metavar="FOLDER", help="The bundle to write.", panel=OUTPUT)]
MaybeOutputOpt = Annotated[str | None, _option("--output", "-o", metavar="PATH", help="Where to write.", panel=OUTPUT)]
RequiredBackendOpt = Annotated[
    str,
    _option(
        "--backend", "-b", metavar="NAME[:PRESET]", help="inductor, cudagraphs, aoti, ort, trt …; gpuopt backends lists them.", panel=BUILD
    ),
]
MaybeDeviceOpt = Annotated[
    str | None, _option("--device", "-d", metavar="auto|cpu|cuda[:N]", help="Instead of the recipe's device.", panel=BUILD)
]
RefreshOpt = Annotated[bool, _option("--refresh", help="Measure again instead of reading the cache.", panel=MEASURE)]
FormatOpt = Annotated[
    str,
    _option(
        "--format",
        metavar="console|markdown|html|svg|perfetto|junit|github|csv|jsonl|json",
        help="What to write.",
        panel=OUTPUT,
        show_default=True,
    ),
]

RecipesArg = Annotated[list[str], typer.Argument(metavar="RECIPE", help="YAML files.", show_default=False)]
RecipeJsonOpt = Annotated[
    str | None,
    _option(
        "--json",
        metavar="FILE|-|DIR",
        help="Also write the whole report as JSON; - writes nothing else to stdout. Of several recipes, a report each into this folder.",
        panel=OUTPUT,
    ),
]
ReportArg = Annotated[str, typer.Argument(metavar="FILE", help="A report written with --json.", show_default=False)]
BeforeArg = Annotated[str, typer.Argument(metavar="BEFORE", help="A report written with --json.", show_default=False)]
AfterArg = Annotated[
    str | None, typer.Argument(metavar="AFTER", help="A later one; without it, runs of the first are compared.", show_default=False)
]
RunOpt = Annotated[
    list[str] | None,
    _option(
        "--run",
        metavar="NUMBER|WORDS",
        help="Which run, by its place in the report or words of its name, as in 'inductor fp16'. Twice: the one and the other.",
        panel=OUTPUT,
    ),
]
TrustedArg = Annotated[list[str] | None, typer.Argument(metavar="FILE|SHA256", help="What to trust.", show_default=False)]
ListOpt = Annotated[bool, _option("--list", help="Everything trusted.", panel=MODEL)]
ForgetOpt = Annotated[bool, _option("--forget", help="Take the consent back.", panel=MODEL)]
