"""What verification holds candidates against, computed by the first child of a command that needs it and read by the others.

Outputs depend on the model as it was loaded, the inputs, the precision and the device, and on nothing that tells candidates apart. They are kept under a digest of
all of that in the command's own folder (`commons`): tensors as safetensors, the rest as JSON beside them, each with a checksum. Whatever is missing, damaged, too
large or not plain tensors is computed as if there were no folder. An in-process session has none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import ModelRef, Precision
from gpuopt.pipeline import commons, content, verification
from gpuopt.pipeline.verification import Named, Reference, Twin

Kept = TypeVar("Kept", Reference, Twin)

MOST_BYTES = 8 << 30
"""Of one command's references together; never more than half of what is free."""
LARGEST_MODEL_BYTES = 32 << 30
"""Weights above it are not read for a digest: at about 1 GiB/s a core that is half a minute on a single one."""
WAIT_S = 180.0
"""For a child that computes the same thing now; after it, both do."""

_log = logging.getLogger(__name__)


class Shared:
    """The reference and the eager twins of one model on these batches; the digest is taken once, at the first that is asked for."""

    def __init__(self, ref: ModelRef, model: Model, batches: list[Inputs], device: str, *, required: int | None = None) -> None:
        """`ref`: where `model` came from. `required`: see `verification.reference`."""
        self._ref, self._model, self._batches, self._device, self._required = ref, model, batches, device, required
        self._folder = commons.folder()
        self._digest: str | None = None

    def reference(self) -> Reference:
        """As `verification.reference` gives it."""
        return self._shared(
            "reference", Reference, lambda: verification.reference(self._model, self._batches, self._device, required=self._required)
        )

    def twin(self, precision: Precision) -> Twin:
        """As `verification.twin` gives it."""
        return self._shared(
            f"twin:{precision.carrier}",
            Twin,
            lambda: verification.twin(self._model, precision, self._batches, self._device, required=self._required),
        )

    def eager_outputs(self, precision: Precision) -> list[Named]:
        """As `verification.eager_outputs` gives them."""
        return self.outputs(
            f"eager:{precision.carrier}", lambda: verification.eager_outputs(self._model, precision, self._batches, self._device)
        )

    def outputs(self, kind: str, compute: Callable[[], list[Named]]) -> list[Named]:
        """What `compute` makes of these batches; `kind` names all that it depends on besides the model, the batches and the device."""
        return self._shared(kind, Twin, lambda: Twin(outputs=compute())).outputs

    def _shared(self, kind: str, type_: type[Kept], compute: Callable[[], Kept]) -> Kept:
        entry = self._entry(kind)
        if entry is None:
            return compute()
        with entry.locked() as is_held:
            found = entry.read(type_, self._device)
            if found is not None:
                _log.debug("%s: read", kind)
                return found
            made = compute()
            if is_held and not _is_passing(made):
                entry.write(made)
            return made

    def _entry(self, kind: str) -> _Entry | None:
        if self._folder is None:
            return None
        try:
            if self._digest is None:
                values = (self._ref, self._model.form, self._model.sha256, self._model.config, *_computes(self._model))
                given = [(batch.args, dict(batch.kwargs)) for batch in self._batches]
                where = (*_switches(), *_machine(self._device))
                self._digest = content.digest(values, given, self._required, where, limit_bytes=LARGEST_MODEL_BYTES)
        except content.Unreadable as why:
            _log.debug("not shared: the model holds %s", why)
            self._folder = None
            return None
        return _Entry(folder=self._folder, key=hashlib.sha256(f"{kind} {self._digest}".encode()).hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """The files of one key: KEY.lock, KEY.safetensors and, written last, KEY.json."""

    folder: Path
    key: str

    @property
    def tensors(self) -> Path:
        return self.folder / f"{self.key}.safetensors"

    @property
    def facts(self) -> Path:
        return self.folder / f"{self.key}.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Alone with this key, or False after WAIT_S. A holder that dies lets go."""
        try:
            handle = commons.locked(self.folder / f"{self.key}.lock", wait_s=WAIT_S)
        except OSError as error:
            _log.debug("not shared: no lock: %s", error)
            yield False
            return
        try:
            yield True
        finally:
            os.close(handle)

    def read(self, type_: type[Kept], device: str) -> Kept | None:
        """What was written, on this device; None where nothing was, or not all of it, or not what was written."""
        try:
            data = json.loads(self.facts.read_bytes())
            body = data["body"]
            if _checksum(body) != data["sha256"]:
                raise ValueError("the facts were changed")
            with self.tensors.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != body["sha256"]:
                    raise ValueError("the tensors were changed")
            with safe_open(self.tensors, framework="pt", device="cpu") as file:
                outputs = [[(row["name"], _placed(file.get_tensor(row["key"]), row, device)) for row in named] for named in body["outputs"]]
            return type_(outputs=outputs, **body["facts"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            _log.debug("computed again: %s", error)
            return None

    def write(self, made: Reference | Twin) -> None:
        """Leave it for the others, or say in the log why not."""
        why_not = self._refused(made)
        if why_not:
            _log.debug("not shared: %s", why_not)
            return
        files: dict[str, torch.Tensor] = {}
        outputs = []
        for index, named in enumerate(made.outputs):
            rows = []
            for number, (name, tensor) in enumerate(named):
                key = f"{index}.{number}"
                files[key] = tensor.detach().cpu().contiguous()
                place = "cpu" if tensor.device.type == "cpu" else "device"
                rows.append({"name": name, "key": key, "shape": list(tensor.shape), "stride": list(tensor.stride()), "on": place})
            outputs.append(rows)
        temporary = [path.with_name(f"{path.name}.tmp-{os.getpid()}") for path in (self.tensors, self.facts)]
        try:
            save_file(files, temporary[0])
            with temporary[0].open("rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            body = {
                "facts": {field.name: getattr(made, field.name) for field in fields(made) if field.name != "outputs"},
                "outputs": outputs,
                "sha256": checksum,
            }
            temporary[1].write_text(json.dumps({"body": body, "sha256": _checksum(body)}))
            temporary[0].replace(self.tensors)
            temporary[1].replace(self.facts)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            _log.debug("not shared: %s", error)  # a full disk, most likely, which whatever matters will notice for itself
        finally:
            for path in temporary:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _refused(self, made: Reference | Twin) -> str:
        tensors = [tensor for named in made.outputs for _, tensor in named]
        if any(type(t) is not torch.Tensor or t.layout is not torch.strided or t.is_quantized or t.is_meta for t in tensors):
            return "an output is no plain tensor"
        size = sum(tensor.nbytes for tensor in tensors)
        try:
            there = sum(entry.stat().st_size for entry in os.scandir(self.folder))
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return str(error)
        if size > min(MOST_BYTES - there, free // 2):
            return f"{size} bytes of outputs beside {there}, with {free} free"
        return ""


def _computes(model: Model) -> tuple[Any, ...]:
    """What a model computes with. Raises Unreadable."""
    if model.form != "exported":
        return (model.module,)
    if model.sha256 is None:
        raise content.Unreadable("a program that comes from no file")
    # The hash of its file says what it computes; around it lie guards and hooks of torch's own that nobody can read.
    return (dict(model.module.named_parameters()), dict(model.module.named_buffers()), model.module.code)


def _is_passing(made: Reference | Twin) -> bool:
    """A reference at fp32 because memory was short just now: the next child may have more."""
    return isinstance(made, Reference) and "out of memory" in made.kind.lower()


def _placed(stored: torch.Tensor, row: dict[str, Any], device: str) -> torch.Tensor:
    """A tensor as it was computed: its device and its strides, in memory of its own (what is read lies in the file)."""
    if list(stored.shape) != row["shape"] or row["on"] not in ("cpu", "device"):
        raise ValueError(f"{row['name']} was changed")
    made = torch.empty_strided(row["shape"], row["stride"], dtype=stored.dtype, device=device if row["on"] == "device" else "cpu")
    return made.copy_(stored)


def _checksum(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _machine(device: str) -> tuple[str, str, str]:
    """Which device computed it; GPUs of one name are one."""
    kind = torch.device(device).type
    return kind, torch.cuda.get_device_name(device) if kind == "cuda" else "", str(torch.__version__)


def _switches() -> tuple[Any, ...]:
    """What of this process may change bits or kernels; TF32 is not among it, as verification sets it itself."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.mkldnn.enabled,
    )
