"""Training on images of several shapes, through the command line."""

import numpy as np
import pytest
from PIL import Image

from latentsmith import load_config
from latentsmith.data.latent_cache import LatentCache
from latentsmith.training.checkpointing import read_state
from latentsmith.training.metrics_log import read_rows
from latentsmith.training.train import prepared

from .conftest import RECIPES, TEXT, VAE

SHAPES = ((40, 40), (60, 30), (30, 60), (40, 44), (90, 30))  # width, height
WAYS = "model.data.train.augmentations"
NO_CROP = (f"{WAYS}.resize_smallest_side=null", f"{WAYS}.center_crop_h_w=null")
BUCKETS = (*NO_CROP, f"{WAYS}.aspect_buckets={{resolution: 16, step: 4, max_aspect: 4}}")
STEPS = ("trainer.max_steps=8", "model.micro_batch_size=2")
ENCODED = ("model.first_stage_key=image_encoded", "model.cond_stage_key=captions_encoded")


@pytest.fixture(scope="module")
def images(world, tmp_path_factory):
    """20 images of five shapes, imported, and their cache, made with shards' batches sorted by bucket; and `second`,
    7 others of one shape, and `second-cache`."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, cache, numbers, shapes in (
        ("shards", "cache", range(20), SHAPES),
        ("second", "second-cache", range(100, 107), SHAPES[:1]),
    ):
        (folder / f"{name}-source").mkdir()
        for number in numbers:
            width, height = shapes[number % len(shapes)]
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}-source" / f"{number:03}.png")
            (folder / f"{name}-source" / f"{number:03}.txt").write_text(f"a small red circle {number}")
        assert world.call("data", "import", folder / f"{name}-source", folder / name, "--samples-per-shard", 8) == 0
        data = f"model.data.train.dataset_path={folder / name}"
        config = ("--config", "ROOT/tiny.yaml", "--out", folder / cache, data, *BUCKETS, VAE, TEXT)
        assert world.call("precache", *config) == 0
    return folder


def run(world, images, name, *options):
    data = f"model.data.train.dataset_path={images / 'shards'}"
    return world.train("images", name, data, *BUCKETS, *STEPS, *options)


def cached(world, images, name, *options):
    data = f"model.data.train.dataset_path={images / 'cache'}"
    return world.train("cached", name, data, *BUCKETS, *STEPS, *options)


def test_the_cache_keeps_every_image_in_its_bucket(images):
    cache = LatentCache(images / "cache")
    numbers, sizes = cache.buckets()
    assert cache.info["members"]["image_encoded"]["shape"] == [8, None, None] and len(set(numbers)) > 2
    for index, number in enumerate(numbers):
        height, width = sizes[number]
        assert cache[index]["image_encoded"].shape == (8, height // 2, width // 2)


def test_cache_and_images_give_the_same_losses(world, images, capsys):
    still = ("model.optim.lr=0", "model.unet_config.from_pretrained=ROOT/runs/text")
    held_out = f"model.data.validation.dataset_path={images / 'shards'}"
    from_images = run(world, images, "buckets-images", *still, held_out, "trainer.val_check_interval=4")
    output = capsys.readouterr().out
    assert "images of several sizes" in output and "aspect buckets (height x width: samples)" in output
    from_cache = cached(world, images, "buckets-cached", *still)
    assert world.losses(from_cache) == pytest.approx(world.losses(from_images), rel=2e-3)
    assert len({row["val_loss"] for row in read_rows(from_images / "validation.csv")}) == 1


def test_goes_on_bit_for_bit(world, images):
    whole = cached(world, images, "buckets-whole")
    halves = cached(world, images, "buckets-halves", "trainer.max_steps=3")
    cached(world, images, "buckets-halves", "model.data.num_workers=2")
    assert read_rows(halves / "metrics.csv") == read_rows(whole / "metrics.csv")
    assert read_state(world.newest(halves)) == read_state(world.newest(whole))
    accumulated = ("model.micro_batch_size=1", "model.global_batch_size=2")
    parts = cached(world, images, "buckets-parts", *accumulated)
    assert world.losses(parts) == pytest.approx(world.losses(whole), rel=1e-5)


def test_the_measured_scale_is_one_of_all_shapes(world, images):
    runs = [
        make(world, images, f"buckets-scale-{make.__name__}", "model.scale_factor=measured") for make in (run, cached)
    ]
    assert len(world.losses(runs[0])) == 8
    assert world.losses(runs[1])[0] == pytest.approx(world.losses(runs[0])[0], rel=5e-3)


def test_another_bucket_size_is_another_cache(world, images, capsys):
    other = (*NO_CROP, f"{WAYS}.aspect_buckets={{resolution: 16, step: 8}}")
    data = f"model.data.train.dataset_path={images / 'cache'}"
    assert world.call(*world.command("cached", "buckets-other", data, *other)) == 2
    assert "aspect_buckets" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["images", "cached"])
def test_sets_are_mixed_within_buckets(world, images, recipe):
    """The second set with a weight of 3; its cache is one of two that train together."""
    sets = ("shards", "second") if recipe == "images" else ("cache", "second-cache")
    data = f"model.data.train.dataset_path=[{','.join(str(images / one) for one in sets)}]"
    given = (data, "model.data.train.weights=[1,3]", *BUCKETS, *STEPS)
    whole = world.train(recipe, f"mixed-{recipe}", *given)
    halves = world.train(recipe, f"mixed-halves-{recipe}", *given, "trainer.max_steps=3")
    world.train(recipe, f"mixed-halves-{recipe}", *given, "model.data.num_workers=2")
    assert read_rows(halves / "metrics.csv") == read_rows(whole / "metrics.csv") and len(world.losses(whole)) == 8


def test_a_sample_of_several_caches_is_that_of_its_own(world, images):
    """The second one's images have one size, so that its cache does not say that sizes differ; both have buckets."""
    folders = (images / "cache", images / "second-cache")
    arguments = [f"model.data.train.dataset_path=[{folders[0]},{folders[1]}]", "model.scale_factor=measured",
             "model.caption_dropout_rate=0.5", *BUCKETS, *RECIPES["cached"][:2], VAE, TEXT]  # fmt: skip
    held_out = f"model.data.validation.dataset_path=[{folders[1]},{folders[0]}]"
    config = load_config(str(world.root / "tiny.yaml"), [word.replace("ROOT", str(world.root)) for word in arguments])
    samples = prepared(config).samples
    caches = [LatentCache(folder) for folder in folders]
    assert [len(cache) for cache in caches] == [20, 7]
    for index in range(27):
        one = samples.read([index], [0])
        wanted = caches[index >= 20][index - 20 * (index >= 20)]
        assert (one["moments"][0].numpy() == wanted["image_encoded"]).all()
        assert (one["context"][0].numpy() == wanted["captions_encoded"]).all()
    options = [*arguments[:4], *BUCKETS, *STEPS, held_out, "trainer.val_check_interval=4"]
    made = world.train("cached", "several-caches", *options)
    assert len(read_rows(made / "validation.csv")) == 2


def test_a_cache_of_captions_alone_trains_on_its_images(world, tmp_path):
    half = ("model.first_stage_key=images", "model.cond_stage_key=captions_encoded", VAE, TEXT)
    assert world.call("precache", "--config", "ROOT/tiny.yaml", "--out", tmp_path / "captions", *half) == 0
    data = f"model.data.train.dataset_path={tmp_path / 'captions'}"
    still = ("model.optim.lr=0", "model.unet_config.from_pretrained=ROOT/runs/text")
    made = world.train("images", "captions-cached", data, *half, *still)
    plain = world.train("images", "nothing-cached", *still)
    assert world.losses(made) == pytest.approx(world.losses(plain), rel=2e-3)


def test_caches_of_more_than_is_read_train_with_others(world, tmp_path):
    """One with both encodings and one of images alone, whose captions are read as text."""
    sets = [f"model.data.train.dataset_path=[{one}]" for one in ("ROOT/cache,ROOT/latents", "ROOT/latents,ROOT/cache")]
    for number, data in enumerate(sets):
        made = world.train("text", f"more-{number}", data, "trainer.max_steps=12")
        assert len(world.losses(made)) == 12


def test_caches_that_do_not_train_together(world, images, capsys):
    given = (*BUCKETS, VAE, TEXT)
    data = f"model.data.train.dataset_path={images / 'shards'}"
    kept = "model.data.cache={latents: mean}"
    assert world.call("precache", "--config", "ROOT/tiny.yaml", "--out", images / "means", data, kept, *given) == 0
    for other, message in ((images / "means", "precache both alike"), ("ROOT/cache", "made with transforms")):
        sets = f"model.data.train.dataset_path=[{images / 'cache'},{other}]"
        assert world.call(*world.command("cached", "unlike", sets, *BUCKETS)) == 2
        output = capsys.readouterr().err
        assert message in output.splitlines()[-1] and output.count("latentsmith:") == 1
    first = f"{images / 'cache'}/shard-000000.tar"
    for parts in (first, f"[{first},{images / 'second-cache'}]", f"[{images / 'cache'},{images / 'cache'}]"):
        given = f"model.data.train.dataset_path={parts}"
        assert world.call(*world.command("cached", "parts", given, *BUCKETS)) == 2
        assert "taken whole" in capsys.readouterr().err


def test_filterings_take_large_images(world, images, capsys):
    for name, make in (("images", run), ("cached", cached)):
        large = "model.data.train.filterings.resolution={method: larger, value: 40}"
        made = make(world, images, f"large-{name}", large)
        assert len(world.losses(made)) == 8
        assert "filterings: 8 of 20 samples are taken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((f"{WAYS}.aspect_buckets.step=3",), "do not divide by 2"),
        ((f"{WAYS}.aspect_buckets.resolution=null",), "a resolution, and perhaps step"),
        (("model.data.train.filterings.resolution.value=5000",), "leaves all of them out"),
        (("model.data.train.filterings.resolution.method=larger",), "has no effect alone"),
        (("model.inductor=true",), "compiles for one size"),
    ],
)
def test_what_does_not_go_together_is_one_line(world, images, capsys, options, message):
    given = [option.replace("SHARDS", str(images / "shards")) for option in options]
    data = f"model.data.train.dataset_path={images / 'shards'}"
    assert world.call(*world.command("images", "bad-buckets", data, *BUCKETS, *given)) == 2
    output = capsys.readouterr().err
    assert message in output.splitlines()[-1] and output.count("latentsmith:") == 1
    assert not (world.root / "runs" / "bad-buckets").exists()
    assert world.call(*world.command("images", "bad-buckets", data, *BUCKETS, *given), "--dry-run") == 2
    assert message in capsys.readouterr().err


def test_filterings_are_of_training_alone(world, tmp_path, capsys):
    wanted = "model.data.train.filterings.resolution.value=10"
    assert world.call(*world.command("vae", "filtered-vae", wanted)) == 2
    assert "not of train-vae" in capsys.readouterr().err
    given = ("--config", "ROOT/tiny.yaml", "--out", tmp_path / "cache", wanted, VAE, TEXT)
    assert world.call("precache", *given) == 0
    assert "all of them are cached" in capsys.readouterr().out and len(LatentCache(tmp_path / "cache")) == 22


def test_variants_and_means_train(world, tmp_path):
    """A cache of two crops and their mirror images as means: training draws among four encodings of each image."""
    crops = f"{WAYS}.random_crop_h_w='12, 12'"
    transforms = (f"{WAYS}.center_crop_h_w=null", crops, f"{WAYS}.horizontal_flip=true")
    kept = "model.data.cache={latents: mean, crops: 2, flipped: true, share_captions: true}"
    given = ("--config", "ROOT/tiny.yaml", "--out", tmp_path / "cache", *transforms, kept, VAE, TEXT)
    assert world.call("precache", *given) == 0
    cache = LatentCache(tmp_path / "cache")
    assert cache.variants == 4 and cache[0]["image_encoded"].shape == (4, 6, 6)
    data = f"model.data.train.dataset_path={tmp_path / 'cache'}"
    whole = world.train("cached", "variants", data, *transforms)
    world.train("cached", "variants-halves", data, *transforms, "trainer.max_steps=2")
    halves = world.train("cached", "variants-halves", data, *transforms)
    assert read_rows(halves / "metrics.csv") == read_rows(whole / "metrics.csv") and len(world.losses(whole)) == 4
