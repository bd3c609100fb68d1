"""Captions to token ids, as CLIP does it: clean, split into words, byte-pair encode, frame with start and end, pad.

CLIP's own vocabulary (49,408 tokens) is read from any of the files it is published as; a small one can be trained.
Both have one layout: 256 byte symbols, the same ending a word, one token per merge, start, end.
"""

import html
import json
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, overload

import tokenizers
import torch
from tokenizers import normalizers, pre_tokenizers
from torch import Tensor

from latentsmith.files.atomic import write_text
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text

from .vocabulary import (
    CLEANING_KEY,
    END,
    START,
    WORD_END,
    Vocabulary,
    byte_symbols,
    bytes_of_symbols,
    clip_tokens,
    find_vocabulary,
    read_vocabulary,
)

Cleaning = Literal["transformers", "open_clip"]

OPEN_CLIP_NAMES = {START: "<start_of_text>", END: "<end_of_text>"}
# Splits a caption into words as Unicode stood when the tokenizers library was built: characters assigned later are
# punctuation, which may end a word elsewhere than in open_clip.
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """tokenizer(["a photo of a cat"]) -> int64 (1, max_length): start, the caption's tokens, end, padding.

    max_length: both ends included; what does not fit is cut, the end kept.
    cleaning: "transformers" (Unicode NFC, whitespace to one blank, lower case) or "open_clip" (ftfy, HTML entities
    resolved, the same; padded with 0) for models made with FrozenOpenCLIPEmbedder. None: as the files say, else as
    transformers.
    pad: the token to fill up with, by default the files' own choice, else the end token. As in transformers, a pad
    token in a caption stands for itself: with pad "!" every "!" becomes id 0, not "!</w>".
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        max_length: int = 77,
        *,
        cleaning: Cleaning | None = None,
        pad: str | None = None,
    ) -> None:
        cleaning = cleaning or vocabulary.cleaning or "transformers"  # type: ignore[assignment]
        assert max_length >= 2 and cleaning in ("transformers", "open_clip")
        self.vocabulary, self.max_length, self.cleaning = vocabulary, max_length, cleaning
        tokens = vocabulary.tokens
        self.start_id, self.end_id = tokens[START], tokens[END]
        self.pad = pad or ("!" if cleaning == "open_clip" else vocabulary.pad or END)
        if self.pad not in tokens:
            raise BadInput(f"pad token {self.pad!r} is not in the vocabulary; name one that is, such as {END!r}")
        self.pad_id = tokens[self.pad]
        self._encoder = _open_clip_encoder(vocabulary) if cleaning == "open_clip" else _encoder(vocabulary, self.pad)
        self._clean: Callable[[str], str] = open_clip_clean if cleaning == "open_clip" else whole_characters
        self.added: dict[str, tuple[int, ...]] = {}  # token, lower case -> its ids, beyond the vocabulary's

    @classmethod
    def from_file(cls, path: str | Path, max_length: int = 77, **options: Any) -> "Tokenizer":
        """Read tokenizer.json, open_clip's .txt.gz, or a folder with tokenizer.json or vocab.json and merges.txt."""
        return cls(read_vocabulary(path), max_length, **options)

    @classmethod
    def find(
        cls,
        tokenizer: str | Path | None = None,
        checkpoint: str | Path | None = None,
        max_length: int = 77,
        **options: Any,
    ) -> "Tokenizer":
        """Open CLIP's tokenizer wherever `find_vocabulary` finds its files."""
        return cls.from_file(find_vocabulary(tokenizer, checkpoint), max_length, **options)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.tokens)

    @overload
    def __call__(self, texts: list[str], *, return_cut: Literal[False] = False) -> Tensor: ...
    @overload
    def __call__(self, texts: list[str], *, return_cut: Literal[True]) -> tuple[Tensor, list[str]]: ...
    def __call__(self, texts: list[str], *, return_cut: bool = False) -> Tensor | tuple[Tensor, list[str]]:
        """Return int64 (len(texts), max_length); with return_cut also the end of each text that did not fit, else "".

        Without return_cut a text that is cut is warned of, once.
        """
        assert not isinstance(texts, str), "texts is a list of captions, one or more"
        rows, cut = [], []
        for text in texts:
            ids, rest = self._row(self._clean(text))
            rows.append(ids)
            cut.append(rest)
        if any(cut) and not return_cut:
            warnings.warn(f"captions of over {self.max_length} tokens are cut (return_cut tells where)", stacklevel=2)
        batch = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.max_length)
        return (batch, cut) if return_cut else batch

    def add_token(self, token: str, ids: Iterable[int]) -> None:
        """Let a word stand for ids beyond the vocabulary, as textual inversion does; its case does not matter.

        Raises BadInput for a token that is blank or known already.
        """
        name = self._clean(token).strip().lower()
        if not name or re.search(r"\s", name):
            raise BadInput(f"token {token!r}: a trained token is one word, such as <cat-toy>")
        if name in self.added:
            raise BadInput(f"token {token!r} is there already; remove that first, or give this one another name")
        if len(self.encode(token)) == 1:
            raise BadInput(f"token {token!r} is a token of the vocabulary; name one that is not, such as <{token}>")
        self.added[name] = tuple(ids)

    def remove_token(self, token: str) -> None:
        """Undo add_token. Raises BadInput for a token that was not added."""
        if self.added.pop(self._clean(token).strip().lower(), None) is None:
            raise BadInput(f"token {token!r} was not added; those are {', '.join(self.added) or 'none'}")

    def _encoded(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of a cleaned text, and where in the text each one starts."""
        if not self.added:
            encoded = self._encoder.encode(text, add_special_tokens=False)
            return encoded.ids, [start for start, _ in encoded.offsets]
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        longest_first = sorted(self.added, key=len, reverse=True)
        words = "|".join(
            rf"(?<!\w){re.escape(name)}(?!\w)" if name[:1].isalnum() else re.escape(name) for name in longest_first
        )
        for piece in re.split(f"({words})", text, flags=re.IGNORECASE):
            if own := self.added.get(piece.lower()):
                ids, starts = [*ids, *own], [*starts, *[at] * len(own)]
            else:
                encoded = self._encoder.encode(piece, add_special_tokens=False)
                ids, starts = [*ids, *encoded.ids], [*starts, *(at + start for start, _ in encoded.offsets)]
            at += len(piece)
        return ids, starts

    def _row(self, text: str) -> tuple[list[int], str]:
        ids, starts = self._encoded(text)
        room = self.max_length - 2
        rest = text[starts[room] :] if len(ids) > room else ""
        return self.frame(ids[:room]), rest

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, of any length, without start, end and padding."""
        return self._encoded(self._clean(text))[0]

    def frame(self, ids: list[int]) -> list[int]:
        """Put at most max_length - 2 ids between start and end and pad them to max_length."""
        row = [self.start_id, *ids, self.end_id]
        return row + [self.pad_id] * (self.max_length - len(row))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that ids stand for, as cleaning left it, one blank between words."""
        names, letters = {index: name for name, index in self.vocabulary.tokens.items()}, bytes_of_symbols()
        names |= {index: token + WORD_END for token, every in self.added.items() for index in every}
        parts = (names[index].replace(WORD_END, chr(288)) for index in ids)  # 288 stands for a blank
        return bytes(letters[letter] for part in parts for letter in part).decode("utf-8", "replace").strip()

    def metadata(self) -> dict[str, Any]:
        """Return all that decides which ids a caption gets."""
        table = json.dumps([self.vocabulary.tokens, self.vocabulary.merges], sort_keys=True)
        return {
            "vocabulary": fingerprint_text(table),
            "vocab_size": self.vocab_size,
            "max_length": self.max_length,
            "cleaning": self.cleaning,
            "pad": self.pad,
            **({"added": {token: list(ids) for token, ids in self.added.items()}} if self.added else {}),
        }

    def fingerprint(self) -> str:
        return fingerprint_text(json.dumps(self.metadata(), sort_keys=True))

    def save(self, folder: str | Path) -> None:
        """Write a tokenizer folder as diffusers' checkpoints have it; from_file reads it back."""
        folder, names = Path(folder), {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self.pad}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.max_length, "do_lower_case": True}
        config |= {CLEANING_KEY: self.cleaning} if self.cleaning != "transformers" else {}
        merges = [" ".join(pair) for pair in self.vocabulary.merges]
        write_text(folder / "vocab.json", _json(self.vocabulary.tokens))
        write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
        write_text(folder / "tokenizer_config.json", _json({**config, "add_prefix_space": False, **names}))
        write_text(folder / "special_tokens_map.json", _json(names))
        write_text(folder / "tokenizer.json", _encoder(self.vocabulary, self.pad).to_str(pretty=True))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


# ---- Encoding ----


def _encoder(vocabulary: Vocabulary, pad: str) -> tokenizers.Tokenizer:
    """Return transformers' pipeline: it cleans after the special tokens have been taken out of the raw text."""
    encoder = _bpe(vocabulary.tokens, vocabulary.merges)
    encoder.normalizer = _cleaner()
    encoder.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in {START: 0, END: 0, pad: 0}])
    return encoder


def _cleaner() -> normalizers.Normalizer:
    blanks = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    return normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])


def _open_clip_encoder(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """Return open_clip's pipeline: text arrives clean, and only its own two names for start and end mean them."""
    tokens = {OPEN_CLIP_NAMES.get(token, token): index for token, index in vocabulary.tokens.items()}
    encoder = _bpe(tokens, vocabulary.merges, "'ſ|" + WORD_PATTERN)  # its pattern ignores case, even that of the long s
    encoder.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in OPEN_CLIP_NAMES.values()])
    return encoder


def _bpe(
    tokens: dict[str, int], merges: Iterable[tuple[str, str]], pattern: str = WORD_PATTERN
) -> tokenizers.Tokenizer:
    model = tokenizers.models.BPE(tokens, list(merges), continuing_subword_prefix="", end_of_word_suffix=WORD_END)
    encoder = tokenizers.Tokenizer(model)
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return encoder


def whole_characters(text: str) -> str:
    """Join halves of surrogate pairs, as broken JSON leaves them; a half alone becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def open_clip_clean(text: str) -> str:
    """Clean as open_clip's tokenizer does: ftfy, html.unescape twice, one blank between words, lower case."""
    from ftfy import fix_text  # 0.1 s that most checkpoints do not need

    return " ".join(html.unescape(html.unescape(fix_text(text))).split()).lower()


# ---- Training a vocabulary ----


def train_vocabulary(captions: Iterable[str], size: int, out: str | Path) -> int:
    """Learn the merges that shorten these captions most, write the vocabulary, and return its number of tokens.

    size: tokens at most, at least 514 (256 bytes in two forms, start, end: so that nothing is ever unknown); fewer are
    written when every word has become one token. out: a folder, as Tokenizer.save writes it, or one tokenizer.json.
    The same captions, in any order, give the same file.
    """
    fixed = len(clip_tokens([]))
    if size < fixed:
        raise BadInput(f"vocabulary size {size}: every vocabulary has {fixed} tokens before it learns any; give more")
    learner = _bpe({}, [])
    learner.normalizer = _cleaner()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 2,
        initial_alphabet=byte_symbols(),
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator(map(whole_characters, captions), trainer)
    learned = json.loads(learner.to_str())["model"]["merges"][: size - fixed]
    merges = tuple((first, second) for first, second in learned)
    vocabulary = Vocabulary(clip_tokens(merges), merges)
    if Path(out).suffix == ".json":
        write_text(out, _encoder(vocabulary, END).to_str(pretty=True))
    else:
        Tokenizer(vocabulary).save(out)
    return len(vocabulary.tokens)
