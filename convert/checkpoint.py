"""Opening what PyTorch programs saved, without running code from it, as plain numpy arrays under gPatchTST's names.

What comes in may be hostile: archives are looked at before they are opened, no tensor may be larger than the file that
holds it, and the memory that reading may take is limited.
"""

import contextlib
import hashlib
import io
import json
import pickle
import reprlib
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from minsae_jax.errors import UserError, brief
from minsae_jax.files import atomic_write

Tensors = dict[str, np.ndarray]
Program = Literal["gpatchtst", "supervised", "transformers"]
HALVES = ("float16", "bfloat16")
WRAPPERS = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, a wrapping module
SPARE_MEMORY = 1 << 30  # bytes that reading may take beside four times the file


@dataclass(frozen=True)
class Checkpoint:
    """What an encoder's checkpoint says.

    tensors: under gPatchTST's names, RevIN's own under `revin.`. dtypes: of those that are not kept as they came.
    config: the settings that the checkpoint carries, {} where it has none. form: "checkpoint" as gPatchTST's training
    saves it, or a bare state dict.
    """

    path: Path
    sha256: str
    program: Program
    tensors: Tensors
    config: dict[str, Any]
    form: Literal["checkpoint", "state dict"] = "state dict"
    dtypes: dict[str, str] = field(default_factory=dict)


def load_torch(path: str | Path) -> Any:
    """The content of a .pth or .pt file, tensors on the CPU. Raises UserError on anything but plain data."""
    try:
        import torch
    except ImportError:
        raise UserError("reading a PyTorch file needs torch: install minsae_jax[torch]") from None
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint file {path}")
    path.open("rb").close()  # an OSError where it may not be read
    _look_at_archive(path)
    scalar = np.float64(0).__reduce__()[0]
    numpy_scalars: list[Any] = [
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 names it
        np.dtype,
        *(type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?")),
    ]
    try:
        with (
            torch.serialization.safe_globals(numpy_scalars),
            warnings.catch_warnings(),
            _little_memory(path),
        ):
            warnings.simplefilter("ignore")  # torch's own, on how it would rather be called
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        unsafe = _unsafe_globals(path)
        if unsafe:
            raise UserError(
                f"{path} holds code or objects ({unsafe}), not only weights: it was not opened"
            ) from e
        raise UserError(f"{path} is no PyTorch checkpoint, or a damaged one") from e
    except MemoryError as e:
        raise UserError(
            f"{path} asks for far more memory than its size explains: it was not opened"
        ) from e
    except Exception as e:
        raise UserError(
            f"{path} is no PyTorch checkpoint, or a damaged one ({type(e).__name__})"
        ) from e


def _look_at_archive(path: Path) -> None:
    """Refuse what torch.save never writes: no archive at all, or one that grows when it is opened."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:
        raise UserError(
            f"{path} is no PyTorch checkpoint, or a damaged one (one from before PyTorch 1.6 must be loaded and saved "
            "again with torch)"
        ) from None
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise UserError(f"{path} is compressed, which no PyTorch checkpoint is: it was not opened")
    if sum(e.file_size for e in entries) > path.stat().st_size:
        raise UserError(
            f"{path} is no PyTorch checkpoint, or a damaged one: its parts say that they exceed the file"
        )


@contextlib.contextmanager
def _little_memory(path: Path) -> Iterator[None]:
    """Reading a file must not take the machine's memory, whatever the file says. Only Linux enforces this."""
    try:
        import resource

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = taken + SPARE_MEMORY + 4 * path.stat().st_size
        if soft != resource.RLIM_INFINITY:
            limit = min(limit, soft)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, OSError, ValueError):  # not Linux
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _unsafe_globals(path: Path) -> str:
    import torch

    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path)[:3])
    except Exception:  # not even a pickle inside a zip
        return ""


def save_torch(path: Path, content: Any) -> None:
    """torch.save, written aside and renamed. Raises OSError where that fails."""
    import torch

    whole = io.BytesIO()
    torch.save(content, whole)  # which raises anything but OSError where it writes to a file itself
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, shared=True) as aside:
        aside.write_bytes(whole.getbuffer())


def to_numpy(state: Any, path: Path, part: str = "") -> Tensors:
    """The tensors of a state dict in the file at path, in their own dtype. Raises UserError where a value is no tensor,
    or not plain numbers."""
    import torch

    where = f"{path}{f' ({part})' if part else ''}"

    if not isinstance(state, dict) or not state:
        raise UserError(f"{where} holds no state dict")
    wrong = [
        str(k)[:80]
        for k, v in state.items()
        if not (isinstance(k, str) and isinstance(v, torch.Tensor))
    ]
    if wrong:
        raise UserError(f"{where} is no state dict: {', '.join(wrong[:3])} is no tensor")
    try:
        tensors = {k: _numpy(v.detach()) for k, v in state.items()}
    except Exception as e:
        raise UserError(
            f"{where} holds tensors that are not plain numbers (sparse, quantized, without data, or larger than what "
            "is stored of them)"
        ) from e
    if sum(t.nbytes for t in tensors.values()) > 4 * path.stat().st_size:
        raise UserError(
            f"{where} holds tensors that share so much storage that they are far larger than the file"
        )
    return tensors


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError("a view that repeats its numbers")
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def load_safetensors(path: Path) -> Tensors:
    """A safetensors file's tensors, in their own dtype. Raises UserError on a damaged one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path} is no safetensors file, or a damaged one ({_short(e)})") from e


def load_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises UserError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as JSON ({_short(e)})") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON mapping")
    return content


def _short(e: Exception) -> str:
    return brief(e, 150)


def shown(value: Any) -> str:
    """A value from a file, for a sentence: short, however large it is."""
    try:
        text = reprlib.repr(value)
    except Exception:  # a number of thousands of digits, a hostile __repr__
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else f"{text[:77]}..."


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A .pth of gPatchTST or of the official PatchTST, in any of the forms that their users meet: what training saved,
    a bare state dict, one under `model` or `state_dict`, with the prefixes that wrappers leave."""
    content = load_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    key = next(
        (
            k
            for k in ("model_state_dict", "state_dict", "model")
            if isinstance(content.get(k), dict)
        ),
        None,
    )
    path = Path(path)
    tensors, wrappers = without_prefixes(to_numpy(content[key] if key else content, path))
    if any(k.startswith("model_trend.") for k in tensors):
        raise UserError(
            f"{path} decomposes its input for two PatchTSTs (model_trend, model_res), which is not supported"
        )
    revin = content.get("revin_state_dict") if key else None
    if revin:
        own, _ = without_prefixes(to_numpy(revin, path, "revin_state_dict"))
        tensors |= {f"revin.{k}": v for k, v in own.items()}
    program: Program = "gpatchtst"
    if any(k.startswith("revin_layer.") for k in tensors):
        program = "supervised"
        tensors = {k.replace("revin_layer.", "revin."): v for k, v in tensors.items()}
    elif key is None and "model." in wrappers and _reads_all_patches(tensors):
        program = "supervised"
    config = content.get("config") if key else None
    return checkpoint_of(
        path, sha256_of(path), program, tensors, config if isinstance(config, dict) else {},
        "checkpoint" if key == "model_state_dict" else "state dict",
    )  # fmt: skip


def checkpoint_of(
    path: Path, sha256: str, program: Program, tensors: Tensors, config: dict[str, Any],
    form: Literal["checkpoint", "state dict"] = "checkpoint",
) -> Checkpoint:  # fmt: skip
    """The same with every floating-point tensor in float32."""
    dtypes = {k: str(t.dtype) for k, t in tensors.items() if str(t.dtype) in (*HALVES, "float64")}
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused as such
        kept = {k: t.astype(np.float32) if k in dtypes else t for k, t in tensors.items()}
    return Checkpoint(path, sha256, program, kept, config, form, dtypes)


def sha256_of(path: str | Path) -> str:
    with Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def without_prefixes(tensors: Tensors) -> tuple[Tensors, set[str]]:
    """Without what wrappers put before every key, in any order and number; and which these were."""
    found: set[str] = set()
    while prefix := next((p for p in WRAPPERS if all(k.startswith(p) for k in tensors)), None):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
        found.add(prefix)
    return tensors, found


def _reads_all_patches(tensors: Tensors) -> bool:
    """Whether the head is the official supervised program's only one, and the embedding the one it has."""
    head = tensors.get("head.linear.weight", tensors.get("head.linears.0.weight"))
    embedding, position = (tensors.get(f"backbone.{name}") for name in ("W_P.weight", "W_pos"))
    if head is None or embedding is None or position is None or "backbone.cls_token" in tensors:
        return False
    if not head.ndim == embedding.ndim == position.ndim == 2:
        return False
    return head.shape != embedding.T.shape and head.shape[1] == len(embedding) * len(position)
