"""Where a model's weights are; imports no torch until weights are merged."""

import json
from pathlib import Path
from typing import Any

from selfcritique.artifacts import Store, artifact_key
from selfcritique.errors import UserError

ADAPTER = "adapter_config.json"


def plain_checkpoint(folder: Path) -> Path:
    """A folder with all weights of the model in `folder` of a store: itself, or a LoRA adapter merged.

    Merged weights are an artifact of the same store that no key depends on: made once, by whichever process
    comes first, and made again after `store gc`.
    """
    if not (folder / ADAPTER).is_file():
        return folder
    store = Store(folder.parents[1])
    adapter = store.find(folder.parent.name, folder.name, None)
    if adapter is None:
        raise UserError(f"{folder} holds an adapter, but is no finished artifact of a store; run it again.")

    def merge(out: Path) -> dict[str, Any]:
        from selfcritique.train.model import merge_adapter

        merge_adapter(folder, adapter_base(folder), out)
        return {}

    key = artifact_key("merged", 1, {}, {"adapter": adapter.key})
    return store.build("merged", 1, key, {}, {"adapter": adapter}, merge).path


def adapter_base(folder: Path) -> Path:
    """The folder of what an adapter was trained on, named STAGE/KEY in the store where its files lie."""
    config = (folder / ADAPTER).resolve()
    name = json.loads(config.read_text())["base_model_name_or_path"]
    base = config.parents[2] / name
    if not (base / "config.json").is_file():
        raise UserError(
            f"The adapter {folder} was trained on {name}, which is not at {base}: run its experiment again, "
            "or give a merged checkpoint."
        )
    return base
