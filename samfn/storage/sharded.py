"""States of DTensors, written and read by torch.distributed.checkpoint.

PyTorch plans: which rank writes what, so that nothing is written twice, and which part of
which file goes where when other ranks, or one process, read. The files are samfn's own,
as `parts` says: PyTorch's own hold pickles, or do not tell that one is missing.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from samfn.storage import files, parts, tensorfile
from samfn.storage.parts import INDEX, Index, Part, Parts

WriteIndex = Callable[[Path, Index], Any]
NAMED = {"flatten_state_dict": False, "flatten_sharded_tensors": False}  # as they are
WHOLE = ""  # in place of a file's name: the tensor is in memory


def new_group() -> Any:
    """Return a process group for writing in the background; all ranks call it."""
    return dist.new_group(backend="gloo")


def begin(
    path: Path, tensors: Mapping[str, Any], write_index: WriteIndex, group: Any = None
) -> Callable[[], None]:
    """Begin to write a directory, whole or not at all; all ranks call it.

    Args:
        path: where to; its directory exists, for all ranks.
        tensors: DTensors, by name.
        write_index: writes a file, with an index in it, on the first rank.
        group: the process group for writing in the background; None writes at once.

    Returns:
        Waits for the end; raises on all ranks what one raised.
    """
    writer = _Writer(path, write_index)
    how: Any = {"storage_writer": writer, "planner": DefaultSavePlanner(**NAMED)}
    begun: Any = None
    if group is not None:
        begun = async_save(dict(tensors), **how, process_group=group)

    def finish() -> None:
        try:
            begun.result() if begun else save(dict(tensors), **how)
        except CheckpointException as error:
            (_, (failure, _)), *_ = sorted(error.failures.items())
            raise failure from error
        finally:
            writer.close()

    return finish


class _Writer(StorageWriter):
    """Writes a file for each rank, and the index, beside what is to have their name."""

    def __init__(self, path: Path, write_index: WriteIndex) -> None:
        self._path, self._write_index = path.absolute(), write_index
        self._folder: Path | None = None  # on the first rank

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **how: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        place = self._path.parent
        files.require_held(place)
        self._folder = Path(tempfile.mkdtemp(prefix=files.TEMPORARY, dir=place))
        mark = self._folder.name.removeprefix(files.TEMPORARY)
        new = self._folder / mark  # with the permissions that the user wants
        new.mkdir()
        names = (f"rank_{rank:05d}-{mark}.safetensors" for rank in range(len(plans)))
        return [
            replace(plan, storage_data=str((new / name).relative_to(place)))
            for plan, name in zip(plans, names, strict=True)
        ]

    def write_data(self, plan: Any, planner: Any) -> Any:
        tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        path = self._path.parent / plan.storage_data
        hashes = tensorfile.write(path, tensors, {}) if tensors else {}
        done: Any = torch.futures.Future()
        done.set_result(
            [
                WriteResult(item.index, 0, (path.name, hashes[item.index.fqn]))
                for item in plan.items
            ]
        )
        return done

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        assert self._folder is not None  # This is the first rank.
        (new,) = self._folder.iterdir()
        written = {one.index: one.storage_data for found in results for one in found}
        index = {}
        for name, whole in metadata.state_dict_metadata.items():
            like = torch.empty(0, dtype=whole.properties.dtype, device="meta")
            index[name] = Parts(
                like.new_empty(whole.size),
                [
                    Part(
                        chunk.offsets,
                        like.new_empty(chunk.sizes),
                        *written[MetadataIndex(name, chunk.offsets)],
                    )
                    for chunk in whole.chunks
                ],
            )
        self._write_index(new / INDEX, index)
        parts.publish(new, self._path)

    def close(self) -> None:
        """Delete what came to nothing."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def load(
    directory: Path, whole: Mapping[str, Tensor], index: Index, wanted: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Read what this rank keeps of some tensors.

    Args:
        directory: of the files of parts.
        whole: what is in memory already, by name.
        index: of the parts of all others.
        wanted: gives names, shapes, dtypes, devices, memory formats, meshes, placements.

    Raises as `parts.verify`.
    """
    known = {
        name: Parts(leaf, [Part((0,) * leaf.ndim, leaf, WHOLE, "")])
        for name, leaf in whole.items()
    }
    known |= index
    made = {name: torch.empty_like(leaf) for name, leaf in wanted.items()}
    planner = DefaultLoadPlanner(**NAMED)
    planner.set_up_planner(dict(made), _planned({name: known[name] for name in made}), True)
    plan = planner.finish_plan(planner.create_local_plan())
    reads: dict[tuple[str, torch.Size], list[Any]] = {}
    for item in plan.items:
        key = item.storage_index.fqn, torch.Size(item.storage_index.offset or ())
        reads.setdefault(key, []).append(item)

    def take(name: str, part: Part, tensor: Tensor) -> None:
        for item in reads[name, torch.Size(part.offsets)]:
            target = planner.resolve_tensor(item).detach()
            region = zip(item.storage_offsets, item.lengths, strict=True)
            target.copy_(tensor[tuple(slice(at, at + length) for at, length in region)])

    needed = [
        (name, part)
        for name in made
        for part in known[name].parts
        if (name, torch.Size(part.offsets)) in reads
    ]
    for name, part in needed:
        if part.file == WHOLE:
            take(name, part, part.layout)
    parts.read(directory, [one for one in needed if one[1].file != WHOLE], take)
    return made


def _planned(index: Index) -> Metadata:
    """Return an index as PyTorch's planner reads it."""
    found: Any = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=whole.layout.dtype),
            whole.layout.shape,
            [
                ChunkStorageMetadata(torch.Size(part.offsets), part.layout.shape)
                for part in whole.parts
            ],
        )
        for name, whole in index.items()
    }
    return Metadata(found)
