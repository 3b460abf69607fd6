"""A checkpoint that another program made, taken over: checked by the one door, and given the start's tokenizer."""

import shutil
from pathlib import Path

from evertune.errors import CheckpointError
from evertune.model.adapter import read_factors, write_adapter
from evertune.model.checkpoint import ADAPTER_CONFIG, INDEX, WEIGHTS, Checkpoint, describe, weight_files
from evertune.model.export import copy_text_files
from evertune.model.open import OpenModel, open_model


def adopt(output: Path, folder: Path, *, start: Checkpoint, dtype: str) -> OpenModel:
    """Copy what is a checkpoint in `output` into the empty `folder`, and open it there.

    Weights and configuration are the program's. Tokenizer, chat template and stop tokens are the start's, whatever the
    program has written: with others, no item of a probe would be the same question before and after. A LoRA adapter is
    taken to stand on `start`. Everything else (optimizer states, logs, checkpoints on the way) is left behind.

    Returns:
        The model in memory, in `dtype`, every tensor there, of the right shape and finite.

    Raises:
        CheckpointError: no checkpoint is there, or it is not sound.
    """
    found = sorted(one.name for one in output.iterdir())
    if not found:
        raise CheckpointError(
            f"{output}: the command has left nothing here.",
            remedy="Let it save the model in {output}, with save_pretrained.",
        )
    if (output / ADAPTER_CONFIG).is_file():
        write_adapter(read_factors(output), folder, start)
    else:
        for file in [*weight_files(output), output / "config.json", output / INDEX]:
            if file.is_file() and not (file.name == INDEX and (output / WEIGHTS).is_file()):
                shutil.copyfile(file, folder / file.name)
        copy_text_files(start.base.path, folder)
    return open_model(describe(folder), dtype=dtype)
