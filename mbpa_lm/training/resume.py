"""What a resumed run must have in common with the run that was stopped."""

from dataclasses import asdict
from pathlib import Path

from mbpa_lm.checkpoints.checkpoint import Checkpoint, check_same_settings, find_checkpoint, has_checkpoint, load_checkpoint
from mbpa_lm.config import Config
from mbpa_lm.data.corpora import Corpus
from mbpa_lm.errors import CheckpointError
from mbpa_lm.system.progress import console

FREE_TO_CHANGE = ("training.save_steps", "training.patience")
"""Settings that a resumed run may change: they decide when it saves and stops, not what it computes."""


def checkpoint_to_resume(run_folder: Path, config: Config, corpus: Corpus) -> Checkpoint | None:
    """Return the last checkpoint of a run, None before the first; raises CheckpointError where it is of other settings."""
    if not has_checkpoint(run_folder):
        console.print(f"no checkpoint in {run_folder} yet: training from the beginning")
        return None
    folder = find_checkpoint(run_folder, "last")
    check_same_settings(folder, config)
    checkpoint = load_checkpoint(folder, with_position=True)
    assert checkpoint.position is not None
    if any(checkpoint.corpus[split] != corpus.fingerprint(split) for split in ("train", "valid")):
        raise CheckpointError(
            f"{folder} was trained on another text ({checkpoint.corpus['name']}) than {corpus.name} is now; "
            f"resume with the same text, or start another run.folder"
        )
    values = checkpoint.position.values
    saved = {"run.seed": values["seed"], **{f"training.{name}": value for name, value in values["training"].items()}}
    wanted = {"run.seed": config.run.seed, **{f"training.{name}": value for name, value in asdict(config.training).items()}}
    for name, value in wanted.items():
        if saved.get(name) != value and name not in FREE_TO_CHANGE:
            raise CheckpointError(
                f"{folder} was trained with {name} {saved.get(name)!r}, the configuration says {value!r}; resume with the "
                f"same values, or start another run.folder"
            )
    return checkpoint
