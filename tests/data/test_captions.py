"""Changed captions: functions of the seed alone, uniform over it."""

from collections import Counter
from itertools import permutations

import pytest

from latentsmith.data.captions import CaptionRules
from latentsmith.data.shuffle import sample_seed

SEEDS = [sample_seed(5, position) for position in range(3000)]


def test_without_rules_a_caption_stays():
    assert CaptionRules()("a cat, {x|y},b", 3) == "a cat, {x|y},b"


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (CaptionRules(prefix="sks,", suffix="best"), "sks, a, b best"),
        (CaptionRules(prompt="a photo of a sks dog"), "a photo of a sks dog"),
        (CaptionRules(prompt="", prefix="sks"), "sks"),
    ],
)
def test_prompts_prefixes_and_suffixes(rules, expected):
    assert rules("a, b", 1) == expected


def test_shuffled_tags_come_in_every_order_after_those_that_are_kept():
    rules = CaptionRules(shuffle_tags=True, keep_tags=1)
    found = Counter(rules("sks, a,b ,c", seed) for seed in SEEDS)
    assert set(found) == {"sks, " + ", ".join(order) for order in permutations("abc")}
    assert all(abs(count - 500) < 5 * 500**0.5 for count in found.values())
    assert rules("sks, a,b ,c", SEEDS[7]) == rules("sks, a,b ,c", SEEDS[7])


def test_tags_are_dropped_independently():
    rules = CaptionRules(tag_dropout=0.25, keep_tags=1)
    found = Counter(rules("sks, a, b", seed) for seed in SEEDS)
    expected = {"sks, a, b": 9 / 16, "sks, a": 3 / 16, "sks, b": 3 / 16, "sks": 1 / 16}
    assert set(found) == set(expected)
    for text, share in expected.items():
        assert abs(found[text] - 3000 * share) < 5 * (3000 * share) ** 0.5


def test_wildcards_choose_lines_and_alternatives():
    rules = CaptionRules(wildcards=True)
    found = Counter(rules("a {red|green|} cat {x|y}\n\nthe {dog}", seed) for seed in SEEDS)
    lines = {f"a {colour} cat {letter}" for colour in ("red", "green", "") for letter in "xy"}
    assert set(found) == lines | {"the {dog}"}
    assert abs(found["the {dog}"] - 1500) < 5 * 1500**0.5
    assert all(abs(found[line] - 250) < 5 * 250**0.5 for line in lines)
