"""Checkpoints in a form of our own: slices of logical tensors, independent of the layout. Loading them.

A checkpoint is a directory:

    manifest.json           format version, progress, optimizer and loss-scale counters, layout, versions, every file with
                            its size and SHA-256, and a checksum of itself
    config.yaml             the run's config
    rank-00000.safetensors  fp32 slices of master weights and moments, one file for each writing rank
    rank-00000.json         what these slices are: kind, logical name, logical shape, place under tensor parallelism, range
    tokenizer/              a copy of the tokenizer's files

Each piece of the state is written once, by the rank that owns it. A reader asks for a logical tensor, or for its own
slice of it, and never holds more than one logical tensor; so any layout resumes from any layout, and generation and
conversion read the same files. There is no pickle. A checkpoint of an adaptation holds what is trained alone, and in its
manifest the base's path and the hash of its weights. No state of a random number generator is in it: what a run draws is a
function of its seed and of where it is drawn (lmscale.parallel.seeds). How one is written is lmscale.train.saving's.

DeepSpeed's own checkpoints are not used: they are bound to the ZeRO stage and, under ZeRO 3, to the ranks; they are
pickles; and `latest` may name a torn one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.distributed as dist

from lmscale.errors import CheckpointError
from lmscale.plan.adaptation import Adaptation
from lmscale.train.adapted import name_in_base
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from lmscale.train.engine import Engine
from lmscale.train.fragments import LogicalTensor, write_back
from lmscale.train.moments import blank_moments
from lmscale.train.progress import Progress
from lmscale.train.slices import saved_fragments


def load_checkpoint(engine: Engine, reader: CheckpointReader) -> Progress:
    """Fill an engine's state from a checkpoint of any layout; of an adaptation, all but the base's weights.

    Args:
        engine: a new engine over the same model.
        reader: the checkpoint.

    Returns:
        The progress to go on from.

    Raises:
        CheckpointError: if the checkpoint is of another model, base or optimizer.
    Collectives: every rank must call.
    """
    _check_same_base(engine, reader)
    pieces = saved_fragments(engine)
    _check_same_model({piece.tensor.name: piece.tensor.shape for piece in pieces}, reader)
    optimizer_step = int(reader.manifest["optimizer"]["step"])
    for fragment in pieces:
        engine.basic_optimizer.state.pop(fragment.key, None)
    for fragment in pieces:
        fragment.master.copy_(_read(engine, reader, PARAMETER, fragment.tensor, fragment.start, fragment.end))
        for moment in blank_moments(engine.basic_optimizer, fragment, optimizer_step) if optimizer_step else ():
            moment.values.copy_(_read(engine, reader, moment.kind, moment.tensor, moment.start, moment.end))
    write_back(engine.optimizer, engine.zero_stage)
    _restore_scaler(engine, reader.manifest["loss_scaler"])
    return reader.progress


def load_weights(engine: Engine, reader: CheckpointReader, adaptation: Adaptation | None = None) -> None:
    """Fill an engine's weights from a base's checkpoint of any layout; optimizer and progress are left as they are.

    What an adaptation adds to the base keeps its initial values. Of the base, all is read but for a language-model head
    that a task's head replaces; BERT's pooler becomes the task's.

    Raises:
        CheckpointError: if the checkpoint is of another model, or an adaptation itself.
    Collectives: every rank must call.
    """
    if reader.manifest.get("base") is not None:
        raise CheckpointError(
            "is an adaptation, and no model by itself",
            field="model.init_from",
            value=str(reader.path),
            remedy="merge it into its base first (lmscale adapter merge), or name the base",
        )
    base = None if adaptation is None else adaptation.base
    stored = reader.shapes()
    pieces = {fragment: name_in_base(fragment.tensor.name, stored) for fragment in engine.fragments()}
    wanted = {fragment: name for fragment, name in pieces.items() if base is None or name in stored}
    _check_same_model(
        {name: fragment.tensor.shape for fragment, name in wanted.items()},
        reader,
        leaves=lambda name: base is not None and name not in base,
        needs=frozenset() if base is None else base,
    )
    for fragment, name in wanted.items():
        tensor = replace(fragment.tensor, name=name)
        fragment.master.copy_(_read(engine, reader, PARAMETER, tensor, fragment.start, fragment.end))
    write_back(engine.optimizer, engine.zero_stage)


def _check_same_base(engine: Engine, reader: CheckpointReader) -> None:
    """Check that an adaptation belongs to the engine's base.

    Raises:
        CheckpointError: if it does not, or only one of the two is an adaptation.
    """
    there, here = reader.manifest.get("base"), engine.base
    if (there is None) != (here is None):
        kinds = ("a whole model", "an adaptation of a base")
        raise CheckpointError(
            f"is {kinds[there is not None]}, and the run trains {kinds[here is not None]}",
            field="checkpoint",
            value=str(reader.path),
        )
    if there is not None and here is not None and there["weights_hash"] != here.weights_hash:
        raise CheckpointError(
            f"belongs to another base: {there['path']}, weights {there['weights_hash'][:12]}; "
            f"{here.path} has weights {here.weights_hash[:12]}",
            field="checkpoint",
            value=str(reader.path),
            remedy="name its own base by model.init_from",
        )


def _read(
    engine: Engine, reader: CheckpointReader, kind: str, tensor: LogicalTensor, start: int, end: int
) -> torch.Tensor:
    """Read a range of this rank's slice of a logical tensor.

    Raises:
        CheckpointError: if the checkpoint's optimizer had no such state.
    """
    if not reader.holds(kind, tensor.name):
        raise CheckpointError(
            f"holds no {kind} of {tensor.name}: its optimizer was {reader.manifest['optimizer']['name']}",
            field="checkpoint",
            value=str(reader.path),
            remedy="use the optimizer of its config.yaml, or model.init_from to take the weights alone",
        )
    return reader.fragment(kind, tensor, engine.topology.tp_rank, engine.topology.tp_size, start, end)


def _check_same_model(
    mine: dict[str, tuple[int, ...]],
    reader: CheckpointReader,
    leaves: Callable[[str], bool] = lambda name: False,
    needs: Iterable[str] = (),
) -> None:
    """Compare this rank's tensors with the checkpoint's, and over all ranks what the checkpoint has besides.

    Args:
        mine: logical names and shapes of what this rank reads.
        reader: the checkpoint.
        leaves: tells of a stored tensor whether nobody has to read it.
        needs: tensors that have to be stored.

    Raises:
        CheckpointError: on every rank, with the first difference.
    """
    stored = reader.shapes()
    difference = next(
        (
            f"{name} is {stored.get(name, 'absent')} there and {shape} here"
            for name, shape in mine.items()
            if stored.get(name) != shape
        ),
        next((f"{name} is absent there" for name in sorted(needs) if name not in stored), ""),
    )
    found: list[tuple[set[str], str]] = [(set(), "")] * dist.get_world_size()
    dist.all_gather_object(found, (set(mine), difference))
    unread = {name for name in stored if not leaves(name)}.difference(*(names for names, _ in found))
    differences = [text for _, text in found if text]
    if unread:
        differences.append(f"it holds {min(unread)}, which this one has not")
    if differences and reader.manifest.get("num_directories", 1) > 1 and "absent there" in differences[0]:
        raise reader.lacks(differences[0])
    if differences:
        raise CheckpointError(
            f"is of another model: {differences[0]}",
            field="checkpoint",
            value=str(reader.path),
            remedy="use the model of its config.yaml",
        )


def _restore_scaler(engine: Engine, saved: dict[str, float] | None) -> None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if saved is not None and hasattr(scaler, "cur_hysteresis"):
        for key, value in saved.items():
            setattr(scaler, key, value)
