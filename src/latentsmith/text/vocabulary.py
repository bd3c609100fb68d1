"""CLIP's vocabulary: its layout, where to find it on this machine, and the files it is published as."""

import gzip
import importlib.util
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentsmith.files.errors import BadInput
from latentsmith.files.hub import cached_snapshots
from latentsmith.files.json import read_json
from latentsmith.files.regular import open_regular

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CLEANING_KEY = "latentsmith_cleaning"  # our own entry in tokenizer_config.json
MERGES_OF_CLIP = 48_894  # of the 262,144 in bpe_simple_vocab_16e6.txt.gz
LARGEST_FILE = 64 * 2**20  # bytes; CLIP's files have 1 to 4 MB
TOKENIZER_FILE = "a file of a tokenizer"  # in messages
VARIABLE = "LATENTSMITH_CLIP_VOCAB"
OPEN_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
HUB_NAMES = (
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-base-patch32",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
)


@dataclass(frozen=True)
class Vocabulary:
    """tokens: id of each, 0 to n - 1, START and END among them. merges: the pairs to join, first come first.
    pad, cleaning: what its files say of padding and, if we wrote them, of cleaning; None if they say nothing."""

    tokens: dict[str, int]
    merges: tuple[tuple[str, str], ...]
    pad: str | None = None
    cleaning: str | None = None


def byte_symbols() -> list[str]:
    """Return the 256 characters that stand for bytes, in CLIP's order: first the visible ones, as themselves."""
    return list(bytes_of_symbols())


def bytes_of_symbols() -> dict[str, int]:
    """Return the byte that each of the 256 characters stands for, in CLIP's order."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted({*range(256)} - {*visible})
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


def clip_tokens(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Return token ids in CLIP's order: bytes, bytes ending a word, merges, START, END."""
    symbols = byte_symbols()
    joined = ["".join(pair) for pair in merges]
    names = [*symbols, *(symbol + WORD_END for symbol in symbols), *joined, START, END]
    return {name: index for index, name in enumerate(dict.fromkeys(names))}  # two merges may join to one token


def find_vocabulary(tokenizer: str | Path | None = None, checkpoint: str | Path | None = None) -> Path:
    """Return the file or folder of CLIP's vocabulary, the first there is of: `tokenizer`, the checkpoint's own, the
    environment variable LATENTSMITH_CLIP_VOCAB, the installed open_clip package (not imported), the hub cache.

    tokenizer: a path, or a name in the hub cache such as "openai/clip-vit-large-patch14". checkpoint: a folder, or a
    file in one. Raises BadInput if a name leads nowhere or nothing is found, with what to install or set.
    """
    if tokenizer is not None:
        return _named("tokenizer", tokenizer)
    if own := own_vocabulary(checkpoint):
        return own
    if os.environ.get(VARIABLE):
        return _named(VARIABLE, os.environ[VARIABLE])
    for found in (_open_clip_file(), *map(_in_hub_cache, HUB_NAMES)):
        if found is not None:
            return found
    raise BadInput(
        f"CLIP's vocabulary is not on this machine: `pip install --no-deps open_clip_torch`, or put a tokenizer folder"
        f" (vocab.json and merges.txt) or {OPEN_CLIP_FILE} anywhere and set {VARIABLE} or the option tokenizer to it"
    )


def own_vocabulary(checkpoint: str | Path | None) -> Path | None:
    """Return the vocabulary folder of a checkpoint: in its own folder, in that of the whole model whose text encoder it
    is, or in that of its run."""
    return next(filter(_has_vocabulary, _folders_of(checkpoint)), None)


def _named(what: str, name: str | Path) -> Path:
    path = Path(name).expanduser()
    if path.exists():
        return path
    cached = _in_hub_cache(str(name))
    if cached is None:
        raise BadInput(f"{what}: {str(name)!r} is no file, no folder and no name in the hub cache; correct it")
    return cached


def _folders_of(checkpoint: str | Path | None) -> list[Path]:
    if checkpoint is None:
        return []
    path = Path(checkpoint).expanduser()
    path = path if path.exists() else next(iter(cached_snapshots(str(checkpoint))), path)
    folder = path if path.is_dir() else path.parent
    inside = [path / "tokenizer", path] if path.is_dir() else [folder / "tokenizer"]
    if folder.name in ("ema", "text_encoder"):
        folder = folder.parent
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    return [*inside, folder / "tokenizer", run / "tokenizer"]


def _has_vocabulary(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()


def _open_clip_file() -> Path | None:
    try:
        package = importlib.util.find_spec("open_clip")  # a top-level name: looked up, not executed
    except ValueError:  # a module of that name put in place by hand, without a spec
        return None
    file = Path(package.origin).with_name(OPEN_CLIP_FILE) if package and package.origin else None
    return file if file and file.is_file() else None


def _in_hub_cache(name: str) -> Path | None:
    """Return the vocabulary folder in the newest cached snapshot of a hub repository."""
    folders = [folder for snapshot in cached_snapshots(name) for folder in _folders_of(snapshot)]
    return next(filter(_has_vocabulary, folders), None)


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read tokenizer.json, open_clip's .txt.gz, or a folder with tokenizer.json or vocab.json and merges.txt.

    Raises BadInput for anything missing, damaged or not a byte-level BPE with CLIP's word ends and special tokens.
    """
    path = Path(path)
    if path.is_dir():
        single = path / "tokenizer.json"
        tokens, merges = _read_tokenizer_json(single) if single.is_file() else _read_pair(path)
    elif path.suffix == ".gz":
        tokens, merges = _read_open_clip(path)
    elif path.suffix == ".json":
        tokens, merges = _read_tokenizer_json(path)
    else:
        raise BadInput(
            f"{path}: no vocabulary; give a folder with vocab.json and merges.txt, tokenizer.json or .txt.gz"
        )
    folder = path if path.is_dir() else path.parent
    _refuse_cased(folder)
    added = folder / "added_tokens.json"
    if added.is_file() and (extra := sorted(read_json(added, TOKENIZER_FILE).keys() - tokens.keys())):
        raise BadInput(f"{added}: adds the token {extra[0]!r}; added tokens are not supported, give CLIP's own file")
    if path.suffix == ".gz":
        return _checked(path, Vocabulary(tokens, merges))
    return _checked(path, Vocabulary(tokens, merges, _pad_of(folder), _cleaning_of(folder)))


def _refuse_cased(folder: Path) -> None:
    """Raise BadInput for a tokenizer that keeps capitals: captions are lower-cased here, as CLIP's are."""
    config, whole = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if config.is_file() and read_json(config, TOKENIZER_FILE).get("do_lower_case") is False:
        raise BadInput(f"{config}: do_lower_case false is not supported; CLIP's tokenizer lower-cases")
    if whole.is_file() and "Lowercase" not in str(read_json(whole, TOKENIZER_FILE).get("normalizer", "Lowercase")):
        raise BadInput(f"{whole}: its normalizer does not lower-case, which is not supported; give CLIP's tokenizer")


def _checked(path: Path, vocabulary: Vocabulary) -> Vocabulary:
    tokens = vocabulary.tokens
    missing = [token for token in clip_tokens([]) if token not in tokens]
    if missing:
        raise BadInput(f"{path}: has no token {missing[0]!r}; this is not a CLIP vocabulary, give one of CLIP's layout")
    if sorted(tokens.values()) != list(range(len(tokens))):
        raise BadInput(f"{path}: its ids are not 0 to {len(tokens) - 1}, each once; get the file again")
    for pair in vocabulary.merges:
        if not {*pair, "".join(pair)} <= tokens.keys():
            raise BadInput(
                f"{path}: the merge {' '.join(pair)!r} has no token; vocabulary and merges do not belong together"
            )
    return vocabulary


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    whole = read_json(path, TOKENIZER_FILE)
    model = whole.get("model")
    if not isinstance(model, dict) or model.get("end_of_word_suffix") != WORD_END:
        raise BadInput(f"{path}: no byte-pair vocabulary with words ending in {WORD_END}; give CLIP's tokenizer.json")
    tokens = _token_ids(path, model.get("vocab"))
    for added in whole.get("added_tokens") or []:
        name = added.get("content") if isinstance(added, dict) else added
        if not isinstance(name, str) or name not in tokens:
            raise BadInput(f"{path}: adds the token {name!r}; added tokens are not supported, give CLIP's own file")
    merges = model.get("merges")
    merges = merges if isinstance(merges, list) else [merges]
    return tokens, _pairs(path, [merge.split(" ") if isinstance(merge, str) else merge for merge in merges])


def _read_pair(folder: Path) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    tokens = _token_ids(folder / "vocab.json", read_json(folder / "vocab.json", TOKENIZER_FILE))
    lines = _read_text(folder / "merges.txt").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return tokens, _pairs(folder / "merges.txt", pairs)


def _read_open_clip(path: Path) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    lines = _read_text(path).split("\n")[1 : MERGES_OF_CLIP + 1]
    if len(lines) < MERGES_OF_CLIP:
        raise BadInput(f"{path}: has {len(lines)} merges of {MERGES_OF_CLIP}; get {OPEN_CLIP_FILE} again")
    merges = _pairs(path, [line.split() for line in lines])
    return clip_tokens(merges), merges


def _pairs(path: Path, merges: list[Any]) -> tuple[tuple[str, str], ...]:
    for number, pair in enumerate(merges, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise BadInput(f"{path}: merge {number} is {pair!r}, not two symbols; get the file again")
    return tuple((first, second) for first, second in merges)


def _token_ids(path: Path, tokens: Any) -> dict[str, int]:
    if not isinstance(tokens, dict) or not all(type(index) is int for index in tokens.values()):
        raise BadInput(f"{path}: holds no table of tokens and their numbers; get the file again")
    return tokens


def _pad_of(folder: Path) -> str | None:
    """Return the padding token; Stable Diffusion 2's files disagree, and the first counts, as in transformers."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            pad = read_json(folder / name, TOKENIZER_FILE).get("pad_token")
            pad = pad.get("content") if isinstance(pad, dict) else pad
            if isinstance(pad, str):
                return pad
    return None


def _cleaning_of(folder: Path) -> str | None:
    file = folder / "tokenizer_config.json"
    cleaning = read_json(file, TOKENIZER_FILE).get(CLEANING_KEY) if file.is_file() else None
    if cleaning not in (None, "transformers", "open_clip"):
        raise BadInput(f"{file}: {CLEANING_KEY} is {cleaning!r}, not transformers or open_clip; correct it")
    return cleaning


def _read_text(path: Path) -> str:
    try:
        with open_regular(path) as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read ({error}); get the file again") from error
    if len(data) > LARGEST_FILE:
        raise BadInput(f"{path}: holds more than {LARGEST_FILE} bytes, so is no vocabulary; give another file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text at byte {error.start}; get the file again") from error
