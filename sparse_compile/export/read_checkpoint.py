"""The tensors of a checkpoint, one by one, from whatever file or folder holds it."""

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_compile.from_json import build

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_SAFETENSORS = ".safetensors"
# Bytes of a tensor whose strides name elements of its storage several times.
_MOST_REPEATED = 2**30


def read_checkpoint(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each entry, on the CPU.

    Args:
        path: a safetensors file; a file of ``torch.save`` (``.pt``, ``.pth``, ``.bin``, ``.ckpt``), loaded with
            ``weights_only=True``, whose nested mappings are walked through, but not those of optimizers; or a folder of
            either, with or without the index of Hugging Face's shards.  Where a folder has both, safetensors are taken.

    Raises:
        ValueError: no such checkpoint, with what there is instead.
    """
    for file, names in _files(path).items():
        yield from _read_safetensors(file, names) if file.suffix == _SAFETENSORS else _read_torch(file, names)


def _files(path: Path) -> dict[Path, set[str] | None]:
    """The files of a checkpoint, and which tensors an index places in each; None where there is no index."""
    if path.is_file():
        if path.suffix not in (_SAFETENSORS, *_TORCH):
            allowed = ", ".join((_SAFETENSORS, *_TORCH))
            raise ValueError(f"{path} ends in {path.suffix!r}; allowed are {allowed}, or a folder")
        return {path: None}
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {str(path)!r}")
    for suffixes in ((_SAFETENSORS,), _TORCH):
        found = sorted(file for file in path.iterdir() if file.suffix in suffixes)
        indices = sorted(file for suffix in suffixes for file in path.glob(f"*{suffix}.index.json"))
        if len(indices) > 1:
            raise ValueError(
                f"{path} holds several checkpoints: {', '.join(file.name for file in indices)}; name a file"
            )
        if indices:
            return _indexed(indices[0])
        if found:
            return dict.fromkeys(found)
    raise ValueError(f"the folder {str(path)!r} holds neither *{_SAFETENSORS} nor *{', *'.join(_TORCH)}")


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    try:
        placed = build(dict[str, str], json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of shards: {error!r}") from error
    files: dict[Path, set[str] | None] = {}
    for file in sorted(set(placed.values())):
        if Path(file).name != file:
            raise ValueError(f"{index.name} names the shard {file!r}; allowed is a file in the same folder")
        if not (index.parent / file).is_file():
            raise ValueError(f"{index.name} names the shard {file!r}, which does not exist")
        files[index.parent / file] = {name for name, where in placed.items() if where == file}
    return files


def _read_safetensors(file: Path, names: set[str] | None) -> Iterator[tuple[str, Tensor]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ValueError(f"to read {file.name}, install safetensors: pip install safetensors") from error
    try:
        with safe_open(file, framework="pt") as opened:
            _require(file, names, set(opened.keys()))
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error


def _read_torch(file: Path, names: set[str] | None) -> Iterator[tuple[str, Tensor]]:
    try:
        # Files of old versions of PyTorch cannot be mapped into memory.
        mapped = zipfile.is_zipfile(file)
        if mapped:
            _require_stored(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        tensors = dict(_walk("", content))
    # A damaged or hostile file makes the loader raise anything.
    except Exception as error:
        raise ValueError(f"{file} cannot be loaded with weights_only=True: {type(error).__name__}: {error}") from error
    _require(file, names, set(tensors))
    yield from tensors.items()


def _require_stored(file: Path) -> None:
    """torch.save compresses nothing: what is compressed might become larger than memory."""
    with zipfile.ZipFile(file) as opened:
        records = opened.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("it holds compressed records, which torch.save never writes")
    held = sum(record.file_size for record in records)
    if held > file.stat().st_size:
        raise ValueError(f"it claims to hold {held} bytes but is smaller")


def _walk(path: str, content: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        if content.numel() * content.itemsize > max(_MOST_REPEATED, content.untyped_storage().nbytes()):
            raise ValueError(f"{path!r} has the shape {tuple(content.shape)} and fewer elements in memory")
        yield path, content
    elif isinstance(content, Mapping) and not {"state", "param_groups"} <= content.keys():
        for name, inner in content.items():
            yield from _walk(f"{path}.{name}" if path else str(name), inner)


def _require(file: Path, names: set[str] | None, found: set[str]) -> None:
    if missing := sorted((names or set()) - found):
        raise ValueError(f"{file.name} lacks {missing[0]!r}, which the index places there")
