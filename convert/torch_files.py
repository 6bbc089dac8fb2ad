"""Files that PyTorch programs saved, read as plain NumPy arrays: .pth, .pt and safetensors.

Files may be hostile: no code from them runs, archives are checked before they are opened, no tensor
may be larger than the file that contains it, and commands limit the memory for reading.
"""

import contextlib
import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from minsae_jax.cli import is_command
from minsae_jax.errors import UserError, brief
from minsae_jax.files import atomic_write, make_folder, regular_file

if TYPE_CHECKING:
    import torch

Tensors = dict[str, np.ndarray]
EXTRA_MEMORY = 1 << 30  # bytes that reading may take, plus four times the file


def load_torch(path: str | Path) -> Any:
    """Return the content of a .pth or .pt file, tensors on the CPU.

    Raises UserError if it contains anything but plain data.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            "reading a PyTorch file requires torch: install minsae_jax[torch]"
        ) from None
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint file {path}")
    # Raises OSError here, with its own message, if the file may not be read.
    path.open("rb").close()
    _check_archive(path)
    try:
        with (
            torch.serialization.safe_globals(_numpy_scalar_types()),
            warnings.catch_warnings(),
            _limited_memory(path),
        ):
            # torch advises on how to call it.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        unsafe = _unsafe_globals(path)
        if unsafe:
            raise UserError(
                f"{path} contains code or objects ({unsafe}), not only weights; it was not opened; "
                "save the state dict alone with torch.save"
            ) from e
        raise UserError(_not_a_checkpoint(path)) from e
    except MemoryError as e:
        raise UserError(
            f"{path} asks for far more memory than its size explains; it was not opened"
        ) from e
    except Exception as e:  # torch raises many types on damaged files
        raise UserError(f"{_not_a_checkpoint(path)} ({type(e).__name__})") from e


def _not_a_checkpoint(path: Path) -> str:
    return f"{path} is not a PyTorch checkpoint, or it is damaged"


def _check_archive(path: Path) -> None:
    """Raise UserError on files that torch.save never writes: no archive, or one that expands."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # zipfile raises many types on damaged files
        raise UserError(
            f"{_not_a_checkpoint(path)} (if it is from before PyTorch 1.6, load and save it again "
            "with torch)"
        ) from None
    # torch.save stores without compression; an archive that expands can be a bomb.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path} is compressed, unlike a PyTorch checkpoint; it was not opened")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"{_not_a_checkpoint(path)} (its declared sizes exceed the file)")


def _numpy_scalar_types() -> list[Any]:
    """Return the types torch must allow for numpy scalars, often in checkpoints as losses."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "?")]
    # The second entry is the name under which numpy 1 pickled its scalars.
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]


@contextlib.contextmanager
def _limited_memory(path: Path) -> Iterator[None]:
    """Limit a command's memory to little more than the file needs. Only Linux enforces it.

    In a program that calls the Python API nothing is limited, since its other threads may need
    memory meanwhile. Torch's restricted unpickler calls functions whose result can be far larger
    than the file: bytearray(n), chains of codecs.encode(x, "hex"), numpy's dtype("V<n>"). Checks of
    the archive cannot see them, since the arguments may be built by the pickle itself.
    """
    if not is_command():
        yield
        return
    try:
        import resource  # POSIX only

        used_pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used_pages * resource.getpagesize() + EXTRA_MEMORY + 4 * path.stat().st_size
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
    """Return the first names that torch refused to import from a pickle, or ""."""
    import torch

    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path)[:3])
    except Exception:  # the archive need not contain a pickle
        return ""


def save_torch(path: Path, content: Any) -> None:
    """Write a file with torch.save, atomically. Raises OSError if that fails."""
    import torch

    # torch.save to a file raises other types than OSError when the disk is full.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    make_folder(path.parent)
    with atomic_write(path, shared=True) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def to_numpy(state: Any, path: Path, part: str = "") -> Tensors:
    """Return the tensors of a state dict from the file at `path`, in their own dtype.

    Raises UserError if a value is not a tensor, or not plain numbers.
    """
    import torch

    where = f"{path} ({part})" if part else str(path)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{where} does not contain a state dict")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{where} is not a state dict: {str(key)[:80]} is not a tensor")
    try:
        # Before any copy: tensors can share one storage many times.
        n_bytes = sum(_n_bytes(tensor) for tensor in state.values())
        arrays = {}
        # Some sharing is normal, such as tied weights; four times the file is not.
        if n_bytes <= 4 * path.stat().st_size:
            arrays = {key: _numpy_array(tensor.detach()) for key, tensor in state.items()}
    except Exception as e:  # torch's error depends on the kind of tensor
        raise UserError(
            f"{where} contains tensors that are not plain numbers (sparse, quantized, without "
            "data, or larger than their stored numbers)"
        ) from e
    if not arrays:
        raise UserError(
            f"{where} contains tensors that share so much storage that they are far larger than "
            "the file"
        )
    return arrays


def _n_bytes(tensor: "torch.Tensor") -> int:
    """Return the size of a tensor. Raises ValueError on a view that repeats its numbers."""
    n_bytes = tensor.numel() * tensor.element_size()
    if n_bytes > tensor.untyped_storage().nbytes():
        raise ValueError("a view that repeats its numbers")
    return n_bytes


def _numpy_array(tensor: "torch.Tensor") -> np.ndarray:
    import torch

    # numpy has no bfloat16: reinterpret the bits.
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def load_safetensors(path: Path) -> Tensors:
    """Return the tensors of a safetensors file, in their own dtype. Raises UserError if damaged."""
    try:
        return load_file(regular_file(path))
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as e:
        raise UserError(
            f"{path} is not a safetensors file, or it is damaged ({brief(e, 150)})"
        ) from e
