"""Resolve Hugging Face hub names: downloaded where there is a network, found in the local cache where there is none."""

import re
import warnings
from pathlib import Path

from .errors import BadInput

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SMALL_FILES = ["*.json", "*.txt", "*/*.json", "*/*.txt"]
NOT_NEEDED = ["safety_checker/*"]
# In this order, so that the pickles and the single files of several GB lying beside them are left where they are.
WEIGHTS = (
    ["*/diffusion_pytorch_model*.safetensors", "*/model*.safetensors", "model.safetensors", "open_clip_*.safetensors"],
    ["*/diffusion_pytorch_model*.bin", "*/pytorch_model*.bin", "pytorch_model.bin", "open_clip_pytorch_model.bin"],
)
PUBLISHED = {"laion2b_s32b_b79k": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai": "openai/clip-vit-large-patch14"}


def local_or_hub(path: str | Path, weights: str = "ema") -> Path:
    """Return `path` if it exists or is no hub name ("owner/name"); else the folder of its snapshot.

    weights: "raw" also fetches the weights that were not averaged, where they lie beside the averages. Half-precision
    files are fetched where there are no others.
    Raises BadInput, one line, for a hub name that is neither cached nor can be downloaded.
    """
    local = Path(path).expanduser()
    if local.exists() or not NAME.fullmatch(str(path)) or local.parent.exists() or local.suffix in (".nemo", ".ckpt"):
        return local
    others = NOT_NEEDED if weights == "raw" else [*NOT_NEEDED, "*.non_ema.*"]
    for halves in (False, True):
        ignored = others if halves else [*others, "*.fp16.*"]
        for patterns in WEIGHTS:
            folder = _snapshot(str(path), [*SMALL_FILES, *patterns], ignored)
            files = (file for pattern in patterns for file in folder.glob(pattern))
            if any(halves or ".fp16." not in file.name for file in files):
                return folder
    from huggingface_hub import constants

    where = f"its snapshot in {hub_cache()}" if constants.HF_HUB_OFFLINE else "the hub"
    raise BadInput(f"{path}: {where} has no weights of a known name; download its file and name that")


def published(version: str | None) -> str | None:
    """Return where a text encoder's `version` is: a file that exists, or a hub name; None if it names neither."""
    if version is None or Path(version).expanduser().exists():
        return version
    name = PUBLISHED.get(version, version)
    return name if NAME.fullmatch(name) else None


def hub_cache() -> Path:
    """Return the hub's cache on this machine; its library reads HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME at import."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_snapshots(name: str) -> list[Path]:
    """Return the snapshots of a hub name in the local cache, newest first."""
    if not NAME.fullmatch(name):
        return []
    folders = (hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots").glob("*")
    return sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)


def revision(snapshot: Path) -> str:
    """Return what a snapshot of the local cache is called: a branch or tag that points to it, else its commit."""
    refs = snapshot.parent.parent / "refs"
    files = (path for path in sorted(refs.rglob("*")) if path.is_file())
    named = [path.relative_to(refs).as_posix() for path in files if path.read_text("utf-8").strip() == snapshot.name]
    return named[0] if named else snapshot.name


def _snapshot(name: str, patterns: list[str], ignored: list[str]) -> Path:
    """Return the newest snapshot, brought up to date if the hub can be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, cache_dir=hub_cache(), allow_patterns=patterns, ignore_patterns=ignored))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        if cached := cached_snapshots(name):
            warnings.warn(
                f"{name}: its main revision is not cached; using revision {revision(cached[0])}", stacklevel=3
            )
            return cached[0]
        reason = str(error).split("\n")[0][:100]
        raise BadInput(f"{name}: no such file, and not on the hub or in {hub_cache()} ({reason})") from None
