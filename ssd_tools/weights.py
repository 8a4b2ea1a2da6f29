"""Read a model: a checkpoint, a folder that ssd_tools.hub wrote, or a Hugging Face id OWNER/NAME."""

import json
import re
from pathlib import Path
from typing import Any

import ssd_object_detection as ssd
from ssd_tools.common import optional_import

HUB_FILES = ("config.json", "model.safetensors")  # what `load_published` reads


def load_published(source: ssd.PathLike) -> dict[str, Any]:
    """Return the checkpoint dict of a folder by ssd_tools.hub, or of a Hugging Face id OWNER/NAME."""
    folder = Path(source)
    if not folder.is_dir():
        hub = optional_import("huggingface_hub", f"{source}: no such file, and as a Hugging Face id it")
        try:
            folder = Path(hub.snapshot_download(str(source), allow_patterns=HUB_FILES))
        except Exception as error:  # no network, no such model, no access
            problem = " ".join(str(error).split())[:160]
            raise ssd.InputError(
                f"{source}: no such file or folder, nor on Hugging Face ({problem})"
            ) from None
    missing = [name for name in HUB_FILES if not (folder / name).is_file()]
    if missing:
        raise ssd.InputError(f"{source}: lacks {' and '.join(missing)}, which ssd_tools.hub writes")
    reader = optional_import("safetensors.torch", f"{source}: reading model.safetensors")
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "format_version" not in content:
            raise KeyError("format_version")
        content["args"] = content.get("flags", {})
        saved = ssd.upgrade_checkpoint(content, source)
        names = ("format_version", "version", "config", "classes", "score_thresh", "args")
        checkpoint = {name: saved[name] for name in names}
        checkpoint["model"] = reader.load_file(folder / "model.safetensors")
    except ssd.InputError:  # of another format
        raise
    except Exception as error:  # whatever is wrong with a foreign file
        problem = f"{type(error).__name__}: {error}"
        raise ssd.InputError(f"{source}: not a model of this module ({problem})") from None
    return checkpoint


def is_hub_id(source: ssd.PathLike) -> bool:
    """Whether a source that is no file looks like OWNER/NAME on Hugging Face, not like a checkpoint."""
    is_pair = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None
    return is_pair and Path(source).suffix not in (".pth", ".pt") and not Path(source).exists()


def load_weights(source: ssd.PathLike) -> dict[str, Any]:
    """Return the checkpoint dict of a .pth file, or of what `load_published` takes."""
    if Path(source).is_dir() or is_hub_id(source):
        return load_published(source)
    return ssd.load_checkpoint(source)
