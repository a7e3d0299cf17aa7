"""Where a checkpoint is, and where its model's configuration and tokenizer are."""

from __future__ import annotations

from pathlib import Path

from megatron_srpo.bridge import BridgeError
from megatron_srpo.checkpoints import resolve
from megatron_srpo.core.json_types import read_json

MODEL_FOLDER = "hf"  # in a converted checkpoint: config.json and tokenizer, no weights


def checkpoint_folder(path: Path) -> Path:
    """A checkpoint from a user's path: a folder in Megatron's format, or what `checkpoints.resolve` finds in a run."""
    return path if (path / "metadata.json").is_file() else resolve(path)


def model_folder(checkpoint: Path, given: Path | None) -> Path:
    """The folder with config.json: `given`, the one inside the checkpoint, or the one that the run was started from.
    Raises BridgeError."""
    candidates = [given] if given else [checkpoint / MODEL_FOLDER, *_of_run(checkpoint)]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    looked = " and ".join(str(folder) for folder in candidates)
    raise BridgeError(f"no config.json of the model in {looked}: name its Hugging Face folder with --hf DIR.")


def tokenizer_folder(checkpoint: Path, model: Path, *, given: Path | None) -> Path:
    """The tokenizer's folder: that of the model, unless the run that wrote the checkpoint had another one. Raises
    BridgeError if that one is not there."""
    named = [] if given or model == checkpoint / MODEL_FOLDER else _of_run(checkpoint, "tokenizer")
    for folder in named:
        if not folder.is_dir():
            raise BridgeError(
                f"the run was trained with the tokenizer in {folder} (model.tokenizer), which is not there: put it "
                "back, or name a folder that has config.json and the tokenizer with --hf DIR."
            )
        return folder
    return model


def _of_run(checkpoint: Path, key: str = "path") -> list[Path]:
    """model.path or model.tokenizer of the training run that wrote the checkpoint."""
    try:
        match read_json(checkpoint / "config.json"):
            case {"model": {**section}}:
                named = section.get(key)
                return [Path(named).expanduser()] if isinstance(named, str) and named else []
    except (FileNotFoundError, ValueError):
        pass
    return []
