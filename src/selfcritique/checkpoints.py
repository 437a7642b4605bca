"""Where a model's weights are; imports no torch until weights are merged."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from selfcritique.artifacts import Store, artifact_key
from selfcritique.config import content_digest
from selfcritique.errors import UserError

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]  # of a hub repository
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


def has_code(folder: Path) -> bool:
    """Whether a checkpoint in a store may run code of its own: only then did its files come along."""
    return any(folder.glob("*.py"))


def find_checkpoint(name: str, download: bool = True) -> tuple[Path, str]:
    """Where a checkpoint is, and what it is: a digest of its content, or its commit.

    name: a folder; a GGUF file, by its path or as PACKAGE:FILE of an installed package; or a repository of
    the hub as OWNER/NAME or OWNER/NAME@REVISION, looked for in the hub's cache first. Without `download` one
    that is not there is '' and nowhere, for plans.
    """
    if name.endswith(".gguf"):
        file = _gguf(name)
        return file, content_digest(str(file))
    folder = Path(name).expanduser()
    if any((folder / config).is_file() for config in ("config.json", ADAPTER)):
        return folder, content_digest(name)
    repository, _, revision = name.partition("@")
    if folder.exists() or repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(
            f"There is no checkpoint at {folder} (looked for config.json): give a folder with config.json, "
            "*.safetensors and the tokenizer's files, as save_pretrained writes them, or a repository of the "
            "hub, OWNER/NAME."
        )
    return _hub(repository, revision or None, download)


def _gguf(name: str) -> Path:
    package, _, inside = name.rpartition(":")
    found = find_spec(package) if package else None
    file = Path(found.origin).parent / inside if found and found.origin else Path(inside).expanduser()
    if not file.is_file() or not find_spec("gguf"):
        missing = f"the package {package} is not installed" if package and not found else f"no file {file}"
        missing = "the package gguf is not installed" if file.is_file() else missing
        raise UserError(f"{name}: {missing}. `make setup-vllm` installs both packages of model=smollm2_135m.")
    return file


def _hub(repository: str, revision: str | None, download: bool) -> tuple[Path, str]:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    reason: object = "not asked (HF_HUB_OFFLINE)"
    for local in (True,) if not download or constants.HF_HUB_OFFLINE else (True, False):
        try:
            found = snapshot_download(
                repository, revision=revision, allow_patterns=_FILES, local_files_only=local
            )
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = reason if local else error
        else:
            folder = Path(found)
            if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
                return folder, folder.name
    if not download:
        return Path(repository), ""
    raise UserError(
        f"There is no checkpoint {repository!r}: it is no folder here, not in the hub's cache "
        f"({constants.HF_HUB_CACHE}), and the hub: {reason}. Get it where there is a network, "
        f"`hf download {repository}` (`hf auth login` first if it is gated), and set HF_HOME to that cache, "
        "or give a folder: model.path=FOLDER."
    )
