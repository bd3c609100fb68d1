"""Runs over several sets with prompts, changed captions and weighted losses: DreamBooth with prior preservation."""

import pytest

from latentsmith.training.checkpointing import read_state
from latentsmith.training.metrics_log import read_rows

TWO = "model.data.train.dataset_path=[ROOT/shards,ROOT/shards]"
CAPTIONS = "model.data.train.captions"
RULES = (f"{CAPTIONS}.prefix=sks", f"{CAPTIONS}.wildcards=true", f"{CAPTIONS}.shuffle_tags=true",
         f"{CAPTIONS}.tag_dropout=0.3", f"{CAPTIONS}.separator=' '")  # fmt: skip
PRIOR = (TWO, "model.data.train.repeats=[3,1]", "model.data.train.loss_weights=[1.0,0.5]")


def test_four_steps_are_two_and_two(world):
    options = (*PRIOR, *RULES)
    whole = world.train("images", "captions-whole", *options)
    halves = world.train("images", "captions-halves", *options, "trainer.max_steps=2")
    world.train("images", "captions-halves", *options, "model.data.num_workers=1")
    assert read_rows(halves / "metrics.csv") == read_rows(whole / "metrics.csv")
    assert read_state(world.newest(halves))["checksums"] == read_state(world.newest(whole))["checksums"]
    plain = world.train("images", "captions-plain", *PRIOR)
    assert world.losses(plain) != world.losses(whole)


def test_the_weight_of_the_prior(world):
    """Losses of both sets halved are half the loss; with the weights 1, 0 and 0, 1 they add up to it."""
    losses = {}
    for number, weights in enumerate(("[1,1]", "[0.5,0.5]", "[1,0]", "[0,1]")):
        options = (TWO, "model.data.train.weights=[1,1]", f"model.data.train.loss_weights={weights}")
        losses[weights] = world.losses(world.train("images", f"prior-{number}", *options, "trainer.max_steps=1"))[0]
    assert losses["[0.5,0.5]"] == pytest.approx(losses["[1,1]"] / 2, rel=1e-6)
    assert losses["[1,0]"] + losses["[0,1]"] == pytest.approx(losses["[1,1]"], rel=1e-6)
    assert min(losses.values()) > 0


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("cached", (f"{CAPTIONS}.prefix=x",), "changes captions as they are read, and a cache holds"),
        ("images", (TWO, "model.data.train.repeats=[1]"), "model.data.train.repeats: [1] for 2 sets"),
        ("images", ("model.data.train.repeats=[2]",), "model.data.train.repeats mixes the sets of a list"),
        ("images", (TWO, "model.data.train.loss_weights=[1]"), "loss_weights has 1 entries for 2 sets"),
        ("images", (TWO, f"{CAPTIONS}.prompt=[a,b,c]"), "captions.prompt has 3 entries for 2 sets"),
        ("images", (*PRIOR, "model.data.train.weights=[1,1]"), "both say how often sets are sampled"),
    ],
)
def test_what_cannot_be_is_one_line(world, capsys, kind, options, expected):
    assert world.call(*world.command(kind, "wrong-captions", *options), "--dry-run") == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said
