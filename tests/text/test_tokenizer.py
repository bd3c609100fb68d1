import gzip
import importlib.util
import json
import os
import random
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

from latentsmith.files.errors import BadInput
from latentsmith.text.tokenizer import Tokenizer, open_clip_clean, train_vocabulary
from latentsmith.text.vocabulary import (
    END,
    OPEN_CLIP_FILE,
    START,
    VARIABLE,
    Vocabulary,
    clip_tokens,
    find_vocabulary,
    read_vocabulary,
)

CAPTIONS = [f"a {size} {colour} cat" for size in ("small", "large") for colour in ("red", "green", "navy blue")]


@pytest.fixture(scope="module")
def clip_file():
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("CLIP's vocabulary is not installed (pip install --no-deps open_clip_torch)")
    return Path(package.origin).with_name(OPEN_CLIP_FILE)


@pytest.fixture(scope="module")
def clip(clip_file):
    return Tokenizer.from_file(clip_file)


@pytest.fixture
def small(tmp_path):
    train_vocabulary(CAPTIONS, 560, tmp_path / "small")
    return tmp_path / "small"


def nasty_prompts():
    prompts = [
        "",
        "   ",
        "a photo of a cat",
        "A Photo\tof\n a  CAT ",
        "naïve café",
        "cafe\u0301",
        "x" * 3000,
        "a b " * 300,
        "🙂👨‍👩‍👧 family 🇩🇪",
        "&amp;lt;b&gt; &quot;x&quot; &#233; &nbsp;z",
        "<b>&amp;</b>",
        "&notanentity; &copy &Eacute;",
        "\x00\x01 a\x7fb\tc\n\r\x0bd\x0ce\x1cf\x85g\u2028h",
        "ＦＵＬＬ ｗｉｄｔｈ　ｘ",
        "ﬁne ﬂow ĳ ǆ ŉ ﬅ",
        "Σίσυφος ΣΑΣ",
        "İstanbul ıI",
        "中文字符 日本語 한국어",
        "العربية עברית",
        "ไทย हिन्दी",
        "don't I'LL we'Ve 'Scar 'ſ",
        "12345 6,7.8 ½ Ⅷ ①",
        "\u200b\ufeff zero\u200dwidth",
        "<|startoftext|>hi<|endoftext|> there <|ENDOFTEXT|>",
        "<start_of_text> a <end_of_text>",
        "hello! wow!!!",
        "'" * 30,
        "It’s “quoted” ‘x’ \x93so\x94",
        "\x1b[31mred\x1b[0m",
        "$%^&*()_+{}|:<>?~`-=[]\\;',./",
        "…—–•",
        "ǅ ẞ ß",
        "𝕄𝕒𝕥𝕙 𝐛𝐨𝐥𝐝",
        "a\xa0b\u2009c",
    ]
    draw = random.Random(0)
    # Ranges all of whose characters have long been assigned: newer ones depend on each library's Unicode version.
    ranges = [range(32, 127)] * 3 + [
        range(start, end)
        for start, end in [(0, 32), (0x80, 0x250), (0x300, 0x340), (0x400, 0x500), (0x2010, 0x2060), (0x3041, 0x3090)]
        + [(0x4E00, 0x4F00), (0xFF01, 0xFF5F), (0x1F300, 0x1F600), (0xFB00, 0xFB07), (0x5D0, 0x5EB), (0xE01, 0xE31)]
    ]
    pieces = ["&amp;", "&lt;", "&#39;", "cat", "Dog's", END, "!", "don’t", "  ", "\n"]
    for _ in range(400):
        length = draw.randint(1, 120)
        prompts.append(
            "".join(
                chr(draw.choice(draw.choice(ranges))) if draw.random() < 0.8 else draw.choice(pieces)
                for _ in range(length)
            )
        )
    return prompts


def test_published_ids(clip):
    ids = clip(["a photo of a cat", ""])
    assert ids.dtype == torch.int64 and ids.shape == (2, 77)
    assert ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] and (ids[0, 7:] == 49407).all()
    assert ids[1, 0] == 49406 and (ids[1, 1:] == 49407).all()
    assert clip.vocab_size == 49408 and clip.vocabulary.tokens["!</w>"] == 256


@pytest.mark.parametrize("pad", [END, "!"])
def test_every_id_is_transformers(clip, pad, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer(clip.vocabulary, pad=pad)
    ours.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token == pad
    prompts = nasty_prompts()
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")["input_ids"]
    ids, _ = ours(prompts, return_cut=True)
    assert [prompt for prompt, row in zip(prompts, (ids == expected).all(dim=1), strict=True) if not row] == []


def test_every_id_is_open_clips(clip, clip_file, monkeypatch):
    """open_clip's own tokenizer, its module executed alone."""
    pytest.importorskip("regex")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM", ""))
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", clip_file.with_name("tokenizer.py"))
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    prompts = nasty_prompts()
    expected = reference.SimpleTokenizer()(prompts)
    ids, _ = Tokenizer(clip.vocabulary, cleaning="open_clip")(prompts, return_cut=True)
    assert [prompt for prompt, row in zip(prompts, (ids == expected).all(dim=1), strict=True) if not row] == []


@pytest.mark.parametrize(
    "text, clean",
    [
        ("It’s “ﬁne”", 'it\'s "fine"'),
        ("Caf&amp;eacute; &lt;b&gt;", "café <b>"),
        ("ＦＵＬＬ　Width", "full width"),
        ("\x1b[31mred\x1b[0m\x00 \x93x\x94", 'red "x"'),
        ("cafe\u0301\ufeff", "café"),
        ("\ud83d\ude00 \ud800", "😀 \ufffd"),
    ],
)
def test_open_clip_cleaning(text, clean):
    assert open_clip_clean(text) == clean


def test_half_characters_do_not_stop_a_run(clip):
    assert clip(["\ud83d\ude00 \ud800"]).tolist() == clip(["😀 \ufffd"]).tolist()


def test_what_does_not_fit_is_told(clip):
    ids, cut = clip(["cat " * 75, "cat " * 75 + "and a dog", "x"], return_cut=True)
    assert cut == ["", "and a dog", ""]
    assert ids[0].tolist() == ids[1].tolist() == [49406] + [2368] * 75 + [49407]
    with pytest.warns(UserWarning, match="over 77 tokens are cut"):
        clip(["cat " * 76])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip(["cat " * 75])


def test_open_clip_pads_with_zero_and_keeps_exclamation_marks(clip):
    ids = Tokenizer(clip.vocabulary, cleaning="open_clip")(["cat!"])[0].tolist()
    assert ids[:5] == [49406, 2368, 256, 49407, 0] and set(ids[5:]) == {0}


def test_all_published_forms_are_one_vocabulary(clip, tmp_path):
    clip.save(tmp_path / "all")
    assert read_vocabulary(tmp_path / "all").tokens == clip.vocabulary.tokens
    assert read_vocabulary(tmp_path / "all" / "tokenizer.json").merges == clip.vocabulary.merges
    (tmp_path / "all" / "tokenizer.json").unlink()
    again = Tokenizer.from_file(tmp_path / "all")
    assert again.metadata() == clip.metadata() and again.fingerprint() == clip.fingerprint()


def test_the_special_tokens_map_goes_first(small):
    (small / "special_tokens_map.json").write_text('{"pad_token": {"content": "!", "normalized": false}}')
    assert Tokenizer.from_file(small).pad_id == 0
    assert Tokenizer.from_file(small, pad=END).pad_id == Tokenizer.from_file(small).end_id
    (small / "special_tokens_map.json").unlink()
    assert Tokenizer.from_file(small).pad == END


def test_fingerprint_tells_what_changes_ids(small):
    plain = Tokenizer.from_file(small, 16)
    assert plain.metadata().keys() == {"vocabulary", "vocab_size", "max_length", "cleaning", "pad"}
    others = [
        Tokenizer.from_file(small, 17),
        Tokenizer.from_file(small, 16, pad="!"),
        Tokenizer.from_file(small, 16, cleaning="open_clip"),
        Tokenizer(Vocabulary(plain.vocabulary.tokens, plain.vocabulary.merges[:-1]), 16),
    ]
    prints = [tokenizer.fingerprint() for tokenizer in [plain, *others]]
    assert len(set(prints)) == 5 and Tokenizer.from_file(small, 16).fingerprint() == prints[0]


def test_training_is_the_same_in_any_order_and_leaves_nothing_unknown(tmp_path):
    size = train_vocabulary(CAPTIONS, 530, tmp_path / "a.json")
    assert size == 530 == train_vocabulary(reversed(CAPTIONS), 530, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert list(tmp_path.iterdir()) and not [path for path in tmp_path.iterdir() if path.suffix != ".json"]
    trained = Tokenizer.from_file(tmp_path / "a.json", 40)
    assert trained.end_id == size - 1 and trained.start_id == size - 2
    symbols = {index: token for token, index in trained.vocabulary.tokens.items()}
    ids = trained(["zebra 🙂"])[0].tolist()
    inside = "".join(symbols[index] for index in ids[1 : ids.index(trained.end_id)])
    assert inside.replace("</w>", "").encode("utf-8") == "zebraðŁĻĤ".encode()


def test_a_large_enough_vocabulary_has_every_word_whole(tmp_path):
    size = train_vocabulary(CAPTIONS, 5000, tmp_path)
    assert size < 600
    ids = Tokenizer.from_file(tmp_path, 8)(["a small navy blue cat"])[0]
    assert ids[6] == size - 1 and ids[7] == size - 1 and ids[5] != size - 1  # five words, five tokens


def test_two_merges_that_join_to_one_token_share_it():
    tokens = clip_tokens([("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")])
    assert sorted(tokens.values()) == list(range(514 + 3))


def test_too_small_a_vocabulary(tmp_path):
    with pytest.raises(BadInput, match="size 200: every vocabulary has 514 tokens"):
        train_vocabulary(CAPTIONS, 200, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damaged(folder, change):
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda whole: whole["model"]["vocab"].pop(START), "has no token '<|startoftext|>'"),
        (lambda whole: whole["model"]["vocab"].update({END: 7}), "its ids are not 0 to"),
        (lambda whole: whole["model"]["vocab"].update({END: "7"}), "holds no table of tokens"),
        (lambda whole: whole["model"]["merges"].append(["q", "q"]), "the merge 'q q' has no token"),
        (lambda whole: whole["model"]["merges"].append("q q q"), "is .*'q', 'q', 'q'.*, not two symbols"),
        (lambda whole: whole["model"]["merges"].append(7), "is 7, not two symbols"),
        (lambda whole: whole["model"].update(merges=None), "merge 1 is None, not two symbols"),
        (lambda whole: whole.update(added_tokens=[[]]), r"adds the token \[\]"),
        (lambda whole: whole["model"].update(end_of_word_suffix=None), "no byte-pair vocabulary"),
        (lambda whole: whole.update(added_tokens=[{"content": "<sks>"}]), "adds the token '<sks>'"),
    ],
)
def test_a_damaged_vocabulary_is_named(small, change, message):
    damaged(small, change)
    with pytest.raises(BadInput, match=message):
        read_vocabulary(small)


def test_files_that_are_no_vocabulary(tmp_path):
    for name, data, message in [
        ("a.json", b"{", "not JSON"),
        ("b.json", b"[1]", "holds a list"),
        ("c.json", b"\xff\xfe", "not a file of a tokenizer: not JSON"),
        ("d.txt.gz", b"no gzip", "cannot be read"),
        ("e.txt.gz", gzip.compress(b"header\ni n\n"), "has 2 merges of 48894"),
        ("f.txt.gz", gzip.compress(b"header\ni n\n" * 100_000)[:-900], "cannot be read"),
        ("g.gz", gzip.compress(bytes(70 * 2**20)), "holds more than"),
        ("h.bin", b"", "no vocabulary; give a folder"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match=message):
            read_vocabulary(tmp_path / name)
    with pytest.raises(BadInput, match=r"vocab\.json: no such file; a file of a tokenizer was expected"):
        read_vocabulary(tmp_path)


def test_an_unknown_pad(small):
    with pytest.raises(BadInput, match="pad token '<pad>' is not in the vocabulary"):
        Tokenizer.from_file(small, pad="<pad>")


def hub_entry(cache, name, files, under=""):
    folder = cache / f"models--{name.replace('/', '--')}" / "snapshots" / "abc" / under
    shutil.copytree(files, folder)
    return folder


def test_the_order_of_the_search(small, tmp_path, monkeypatch):
    """Each place in turn, from the last to the first; the package may be looked up, not executed."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(BadInput, match=f"not on this machine: .*pip install.*set {VARIABLE}"):
        find_vocabulary(checkpoint=tmp_path)
    cached = hub_entry(tmp_path / "hub", "openai/clip-vit-large-patch14", small)
    assert find_vocabulary() == cached
    package = tmp_path / "packages" / "open_clip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('executed')")
    (package / OPEN_CLIP_FILE).write_bytes(b"")
    monkeypatch.setattr(sys, "path", [str(package.parent)])
    assert find_vocabulary() == package / OPEN_CLIP_FILE
    monkeypatch.setenv(VARIABLE, str(small))
    assert find_vocabulary() == small
    own = tmp_path / "model" / "tokenizer"
    shutil.copytree(small, own)
    assert find_vocabulary(checkpoint=tmp_path / "model") == own == find_vocabulary(checkpoint=own)
    assert find_vocabulary(cached, checkpoint=tmp_path / "model") == cached


def test_a_name_is_looked_up_in_the_hub_cache(small, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = hub_entry(tmp_path / "hub", "someone/their-diffusion", small, under="tokenizer")
    assert find_vocabulary("someone/their-diffusion") == folder


def test_what_is_named_must_be_there(small, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(BadInput, match="tokenizer: 'nobody/nothing' is no file"):
        find_vocabulary("nobody/nothing")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(BadInput, match=f"{VARIABLE}: .*gone' is no file"):
        find_vocabulary()


def test_the_cleaning_travels_with_the_saved_files(clip, tmp_path):
    """A run trained with open_clip's cleaning is sampled with it: "!" is id 256 there, HTML entities are resolved."""
    ours = Tokenizer(clip.vocabulary, cleaning="open_clip")
    ours.save(tmp_path / "tokenizer")
    back = Tokenizer.find(checkpoint=tmp_path)
    prompts = ["a cat!", "bread &amp; butter"]
    assert back.metadata() == ours.metadata() and torch.equal(back(prompts), ours(prompts))
    assert not torch.equal(Tokenizer.find(checkpoint=tmp_path, cleaning="transformers")(prompts), ours(prompts))
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"open_clip"', '"soap"'))
    with pytest.raises(BadInput, match="latentsmith_cleaning is 'soap'"):
        Tokenizer.find(checkpoint=tmp_path)
