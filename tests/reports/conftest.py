"""Reports with round figures, one a verb, and one full of hostile names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuopt.core import result as r
from gpuopt.reports import pairs


def stats(median: float, noise: float = 0.002) -> r.Stats:
    return r.Stats(
        num_samples=200,
        median=median,
        mean=median * 1.001,
        min=median * 0.99,
        max=median * 1.05,
        stdev=median * 0.004,
        ci95_low=median * (1 - noise),
        ci95_high=median * (1 + noise),
        p90=median * 1.01,
        p95=median * 1.02,
        p99=None,
        num_outliers=1,
    )


ENVIRONMENT = r.Environment(
    gpuopt="0.1.0",
    python="3.12.3",
    platform="Linux x86_64",
    packages={"torch": "2.11.0+cu130", "numpy": "2.3.1", "triton": "3.6.0"},
    cuda="13.0",
    cudnn="9.15",
)

CEILINGS = r.Ceilings(
    rows=(
        r.Ceiling(quantity="fp16", value=800e12, unit="FLOP/s", kind="measured", source="GEMM 8192³"),
        r.Ceiling(quantity="fp32", value=50e12, unit="FLOP/s", kind="measured", source="GEMM 8192³"),
        r.Ceiling(quantity="memory", value=4000e9, unit="byte/s", kind="measured", source="copy of 1 GiB, read + write"),
        r.Ceiling(quantity="h2d", value=50e9, unit="byte/s", kind="measured", source="pinned, 64 MiB"),
        r.Ceiling(quantity="fp16", value=1000e12, unit="FLOP/s", kind="spec", source="data sheet of the X100, dense"),
        r.Ceiling(quantity="fp32", value=60e12, unit="FLOP/s", kind="spec", source="data sheet of the X100"),
        r.Ceiling(quantity="memory", value=5000e9, unit="byte/s", kind="spec", source="data sheet of the X100"),
    )
)

DEVICE = r.Device(
    id="cuda:0",
    name="NVIDIA X100",
    kind="cuda",
    capability="9.0",
    num_sms=100,
    memory_bytes=100 * 2**30,
    cache_bytes=50 * 2**20,
    driver="580.1",
    clocks_mhz={"sm": 1980, "memory": 3201},
    power_limit_w=700.0,
    temperature_c=41,
    other_processes=0,
    ceilings=CEILINGS,
)

ACCURACY = r.Accuracy(
    passed=True,
    reference="fp64",
    stages=(
        r.Stage(
            name="structure",
            passed=True,
            outputs=(
                r.OutputError(
                    name="logits",
                    shape=(256, 1000),
                    dtype="float32",
                    rmse=1e-6,
                    rms_reference=1.0,
                    relative_rmse=1e-6,
                    max_abs=4e-6,
                    cosine=1.0,
                    snr_db=120.0,
                    ratio=1.1,
                ),
            ),
            worst="logits",
            seeds=(0, 1),
        ),
        r.Stage(
            name="precision",
            passed=True,
            outputs=(
                r.OutputError(
                    name="logits",
                    shape=(256, 1000),
                    dtype="float16",
                    rmse=8e-4,
                    rms_reference=1.0,
                    relative_rmse=8e-4,
                    max_abs=4e-3,
                    cosine=0.999999,
                    snr_db=62.0,
                    ratio=0.9,
                ),
            ),
            worst="logits",
            seeds=(0, 1),
        ),
    ),
    worst_output="logits",
    relative_rmse=8e-4,
    deterministic=True,
)

AUDIT = r.PrecisionAudit(shares={"float16": 0.998, "float32": 0.002}, method="post-grad graph", honoured=True, requested="fp16")

_PARTS = {
    "launch gaps": (1.5, "the device waits for the host to launch, 310 kernels a call"),
    "python and framework": (0.5, "the device waits, the host is outside any op"),
    "tensor-core compute": (24.0, ""),
    "memory-bound": (8.0, ""),
    "avoidable: layout": (1.0, "4 passes a call"),
    "avoidable: unfused pointwise": (3.0, "66 passes a call"),
    "idle": (1.0, "between kernels that were already queued"),
    "unaccounted": (1.0, ""),
}

WATERFALL = r.Waterfall(
    wall_ms=40.0,
    parts=tuple(r.WaterfallPart(name=n, ms=_PARTS.get(n, (0.0, ""))[0], detail=_PARTS.get(n, (0.0, ""))[1]) for n in r.WATERFALL_PARTS),
    unaccounted_ms=1.0,
    method="device busy time from a trace of 5 calls (union over streams), idle time from the untraced wall time, split as the trace saw it",
)

BOUNDS = r.Bounds(
    precision="fp16",
    unfused_ms=22.0,
    fused_ms=9.5,
    by_precision={"tf32": 41.0, "fp8": 14.0},
    fused_by_precision={"tf32": 19.0, "fp8": 5.0},
    bytes_fused=2.1e9,
)

ROOFLINE = (
    r.RooflinePoint(
        name="aten.convolution",
        module="layer3.5.conv2",
        dtype="float16",
        count=23,
        time_ns=9e6,
        flops=3.6e12,
        bytes=4e9,
        intensity=900.0,
        bound="compute",
        pct_of_ceiling=50.0,
        ceiling="fp16 measured",
        floor_ns=4.5e6,
        kernels=(
            r.KernelTime(name="sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", time_ns=8e6, count=23.0),
            r.KernelTime(name="void cask::splitKreduce_kernel<32, 16>(float*)", time_ns=1e6, count=23.0),
        ),
        line="resnet.py:146",
    ),
    r.RooflinePoint(
        name="aten.batch_norm",
        module="layer1.0.bn1",
        dtype="float16",
        count=104,
        time_ns=6e6,
        flops=4e9,
        bytes=16e9,
        intensity=0.25,
        bound="memory",
        pct_of_ceiling=66.7,
        ceiling="memory measured",
        floor_ns=4e6,
        kernels=(r.KernelTime(name="void at::native::batch_norm_transform_input_kernel<c10::Half, float>(int)", time_ns=6e6, count=104.0),),
        line="resnet.py:147",
    ),
    r.RooflinePoint(
        name="aten.relu",
        module="layer1.0.relu",
        dtype="float16",
        count=100,
        time_ns=4e6,
        flops=1e9,
        bytes=16e9,
        intensity=0.0625,
        bound="memory",
        pct_of_ceiling=105.0,
        ceiling="memory measured",
        floor_ns=4e6,
        note="its working set fits the 50 MiB cache",
        kernels=(
            r.KernelTime(
                name="void at::native::vectorized_elementwise_kernel<4, at::native::clamp_min_functor>(int)", time_ns=4e6, count=100.0
            ),
        ),
        line="resnet.py:148",
    ),
    r.RooflinePoint(
        name="aten.max_pool2d",
        module="maxpool",
        dtype="float16",
        count=1,
        time_ns=1e6,
        flops=None,
        bytes=1e9,
        intensity=None,
        bound="unknown",
        pct_of_ceiling=None,
        ceiling="",
        floor_ns=None,
    ),
)

MODULES = (
    r.ModuleRow(
        name="",
        module_class="ResNet",
        depth=0,
        time_ns=38e6,
        flops=4e12,
        bytes=60e9,
        num_parameters=44_500_000,
        pct_of_time=100.0,
        pct_of_ceiling=13.0,
    ),
    r.ModuleRow(
        name="conv1",
        module_class="Conv2d",
        depth=1,
        time_ns=2e6,
        flops=6e10,
        bytes=1e9,
        num_parameters=9408,
        pct_of_time=5.3,
        pct_of_ceiling=4.0,
    ),
    r.ModuleRow(
        name="layer1",
        module_class="Sequential",
        depth=1,
        time_ns=10e6,
        flops=8e11,
        bytes=20e9,
        num_parameters=215_808,
        pct_of_time=26.3,
        pct_of_ceiling=10.0,
    ),
    r.ModuleRow(
        name="layer1.0",
        module_class="Bottleneck",
        depth=2,
        time_ns=4e6,
        flops=3e11,
        bytes=8e9,
        num_parameters=75_008,
        pct_of_time=10.5,
        pct_of_ceiling=11.0,
    ),
    r.ModuleRow(
        name="layer1.1",
        module_class="Bottleneck",
        depth=2,
        time_ns=3e6,
        flops=2.5e11,
        bytes=6e9,
        num_parameters=70_400,
        pct_of_time=7.9,
        pct_of_ceiling=11.0,
    ),
    r.ModuleRow(
        name="fc",
        module_class="Linear",
        depth=1,
        time_ns=1e6,
        flops=1e9,
        bytes=5e6,
        num_parameters=2_049_000,
        pct_of_time=2.6,
        pct_of_ceiling=40.0,
    ),
)

RUN = r.Run(
    model="resnet101",
    backend="eager",
    precision="fp16",
    batch=256,
    dims={"N": 256},
    inputs=("x:float16[256,3,224,224]",),
    signature=("x:float16[N,3,224,224]",),
    dim_ranges={"N": (1, 512)},
    input_source="--input",
    latency_ms=stats(40.0),
    samples_per_s=6400.0,
    flops=4e12,
    flops_by_dtype={"float16": 4e12},
    flop_coverage=0.99,
    flop_source="aten dispatch",
    bytes=60e9,
    tflops=100.0,
    pct_of_measured=12.5,
    pct_of_spec=10.0,
    pct_of_roofline=31.0,
    peak_bytes=6 * 2**30,
    energy_j_per_sample=0.11,
    mean_power_w=640.0,
    load_s=1.4,
    compile_s=None,
    cold_start_s=9.5,
    accuracy=ACCURACY,
    precision_audit=AUDIT,
    samples_ns=(40_000_000, 40_100_000, 39_900_000),
    wall_ms=40.2,
    clock="cuda-event",
    reproduce="gpuopt bench gpuopt.models:resnet101 --precision fp16 --batch 256",
)

PROFILE = r.Report(
    schema_version=r.SCHEMA_VERSION,
    command="gpuopt profile model.pt --precision fp16 --batch 256 --depth 3",
    verb="profile",
    environment=ENVIRONMENT,
    device=DEVICE,
    runs=(
        replace(
            RUN,
            waterfall=WATERFALL,
            bounds=BOUNDS,
            roofline=ROOFLINE,
            modules=MODULES,
            input_source="guess: conv1 is a convolution over 3 channels",
        ),
    ),
    findings=(
        r.Finding(code="GPO701", severity="info", message="the model was in training mode; eval mode was set"),
        r.Finding(code="GPO702", severity="warning", message="convolutions run in NCHW", fix="--channels-last"),
    ),
)

BENCH = r.Report(
    schema_version=r.SCHEMA_VERSION,
    command="gpuopt bench gpuopt.models:resnet101 --backend eager --backend inductor:freezing --backend trt --precision fp16 --batch 256 --max-latency 15ms",
    verb="bench",
    environment=ENVIRONMENT,
    device=DEVICE,
    runs=(
        RUN,
        replace(
            RUN,
            backend="inductor",
            preset="freezing",
            transforms=("channels_last", "fold_batch_norm"),
            latency_ms=stats(12.8),
            samples_per_s=20000.0,
            tflops=312.5,
            pct_of_measured=39.1,
            pct_of_spec=31.2,
            compile_s=48.0,
            energy_j_per_sample=0.032,
            relative=r.Relative(ratio=3.125, ci95_low=3.1, ci95_high=3.15, num_pairs=20, verdict="faster", threshold=0.01),
        ),
        replace(
            RUN,
            backend="ort",
            preset="cuda",
            latency_ms=stats(39.8, 0.03),
            samples_per_s=6432.0,
            tflops=100.5,
            pct_of_measured=12.6,
            pct_of_spec=10.1,
            relative=r.Relative(
                ratio=1.005,
                ci95_low=0.97,
                ci95_high=1.04,
                num_pairs=20,
                verdict="inconclusive",
                threshold=0.01,
                reason="the interval is wider than the threshold",
            ),
        ),
        r.Run(
            model="resnet101",
            backend="trt",
            precision="fp16",
            batch=256,
            dims={"N": 256},
            status=r.Status.ENV_MISSING,
            reason="tensorrt is not installed",
            fix="pip install 'gpuopt[trt]'",
        ),
        r.Run(
            model="resnet101",
            backend="cudagraphs",
            precision="fp16",
            batch=256,
            dims={"N": 256},
            status=r.Status.CRASH,
            reason="SIGSEGV: in cudaGraphLaunch",
            reproduce="gpuopt bench gpuopt.models:resnet101 --backend cudagraphs --precision fp16 --batch 256",
        ),
    ),
    gates=(
        r.GateResult(name="max-latency", passed=False, figure="40.0 ms", limit="15 ms", run="resnet101 · eager · fp16 · N=256"),
        r.GateResult(name="max-latency", passed=True, figure="12.8 ms", limit="15 ms", run="resnet101 · inductor:freezing · fp16 · N=256"),
    ),
)

BACKENDS = r.Report(
    schema_version=r.SCHEMA_VERSION,
    command="gpuopt backends model.onnx",
    verb="backends",
    environment=ENVIRONMENT,
    device=DEVICE,
    tables={
        "form": "onnx",
        "model": "model.onnx",
        "matrix": [
            {
                "backend": "eager",
                "summary": "PyTorch, op by op",
                "route": "",
                "reason": "an ONNX file has no PyTorch module",
                "presets": [],
                "precisions": {},
            },
            {
                "backend": "ort",
                "summary": "ONNX Runtime",
                "route": "direct",
                "reason": "",
                "presets": ["cpu", "cuda"],
                "precisions": {"fp32": "", "fp16": "", "fp8": "no fp8 kernels", "int8": "no fp8 kernels"},
            },
            {
                "backend": "trt",
                "summary": "TensorRT",
                "route": "",
                "reason": "tensorrt is not installed: pip install 'gpuopt[trt]'",
                "presets": [],
                "precisions": {},
            },
        ],
    },
)

FAILED = r.Report(
    schema_version=r.SCHEMA_VERSION,
    command="gpuopt profile model.pt",
    verb="profile",
    environment=ENVIRONMENT,
    error=r.Failure(id="GPO200", type="BadInput", message="model.pt: the file is cut short", fix="copy it again", exit_code=3),
)

EVIL = "<script>alert(1)</script>\x1b[31m`|*\u202e::error::%0A]]>&\n=cmd()"

HOSTILE = replace(
    PROFILE,
    command=f"gpuopt profile '{EVIL}'",
    runs=(
        replace(
            PROFILE.runs[0],
            model=EVIL,
            backend=EVIL,
            notes=(EVIL,),
            input_source="guess: " + EVIL,
            inputs=(EVIL,),
            roofline=(replace(ROOFLINE[0], name=EVIL, module=EVIL),),
            modules=(replace(MODULES[0], module_class=EVIL),),
        ),
        r.Run(model=EVIL, backend="null", status=r.Status.CRASH, reason=EVIL, fix=EVIL, reproduce=EVIL),
    ),
    device=replace(DEVICE, name=EVIL),
    findings=(r.Finding(code="GPO1", severity="error", message=EVIL, fix=EVIL),),
    gates=(r.GateResult(name=EVIL, passed=False, figure=EVIL, limit=EVIL, run=EVIL),),
    tables={EVIL: [{EVIL: EVIL}]},
)


def compiled() -> r.Report:
    """PROFILE as a compiler leaves it: a kernel gone, one come, one faster; no gaps; a tenth that nothing could be said of."""
    run = PROFILE.runs[0]
    assert run.latency_ms is not None
    fused = r.KernelTime(name="triton_poi_fused_batch_norm_relu_0", time_ns=5e6, count=104.0)
    points = (
        replace(run.roofline[0], time_ns=8e6),
        replace(run.roofline[1], time_ns=5e6, kernels=(fused,)),
        replace(run.roofline[3], name="triton_red_fused_1", module="?", kernels=(replace(fused, name="triton_red_fused_1", time_ns=1e6),)),
    )
    parts = tuple(
        replace(
            p,
            ms={"launch gaps": 0.2, "python and framework": 0.0, "memory-bound": 4.3, "avoidable: unfused pointwise": 0.0}.get(
                p.name, p.ms
            ),
        )
        for p in WATERFALL.parts
    )
    wall = sum(p.ms for p in parts)
    changed = replace(
        run,
        backend="inductor",
        latency_ms=stats(wall),
        roofline=points,
        modules=tuple(m for m in run.modules if m.name != "fc"),
        waterfall=replace(WATERFALL, wall_ms=wall, parts=parts),
    )
    return replace(PROFILE, runs=(changed,))


REPORTS = {
    "compare": pairs.compared(PROFILE, compiled(), command="gpuopt compare eager.json inductor.json"),
    "profile": PROFILE,
    "bench": BENCH,
    "backends": BACKENDS,
    "failed": FAILED,
    "device": r.Report(schema_version=1, command="gpuopt device", verb="device", environment=ENVIRONMENT, device=DEVICE),
}


@pytest.fixture(params=sorted(REPORTS))
def sample(request: pytest.FixtureRequest) -> tuple[str, r.Report]:
    """(name, report) of each verb."""
    return request.param, REPORTS[request.param]


@pytest.fixture
def hostile() -> r.Report:
    return HOSTILE
