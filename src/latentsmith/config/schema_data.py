"""Options of the data: sets, what is done to their pictures, the latent cache."""

from .schema import group, no_effect, refused, used
from .value_types import anything, choice, either, flag, list_of, mapping, nullable, number, size, text, whole

ONE_LOADER = "every sample is addressed by its position; a run repeats its set until max_steps or max_epochs"

AUGMENTATIONS = (  # applied in the order in which a config names them
    used("resize_smallest_side", whole(1), None, "pixels; bicubic with antialiasing", ["resolution"], optional=True),
    used("center_crop_h_w", size(), None, "cut this out of the middle", ["center_crop"], optional=True),
    used("random_crop_h_w", size(), None, "cut this out at an addressed random place", ["random_crop"], optional=True),
    used("horizontal_flip", flag(), False, "mirror half of the pictures", ["random_flip", "flip"], optional=True),
    *group(
        "aspect_buckets",
        used(
            "resolution",
            whole(1),
            None,
            "in place of a resize and a crop: each picture in the nearest of several sizes of so many pixels squared",
            ["enable_bucket", "bucketing"],
            optional=True,
        ),
        used("step", whole(1), 64, "the sides are multiples of this", ["bucket_reso_steps"], optional=True),
        used("max_aspect", number(1), 2.0, "the longer side over the shorter, at most", optional=True),
    ),
)
FILTERINGS = group(
    "filterings",
    *group(
        "resolution",
        used("method", choice("larger", "smaller"), "larger", "which pictures are taken", optional=True),
        used("value", whole(1), None, "larger: both sides at least so many pixels; smaller: at most", optional=True),
    ),
    no_effect("estimated_portion", anything(), None, "NeMo: how many are left", "they are counted"),
)
PATHS = nullable(either(text(), list_of(text())))

OPTIONS = group(
    "model.data",
    used("num_workers", whole(0), 0, "processes that read and decode, on each device", also=["workers"]),
    used("synthetic_data", flag(), False, "noise instead of a set, to measure a training without its data"),
    used("synthetic_data_length", whole(1), 10000, "samples of that noise"),
    used("accept_unfingerprinted", flag(), False, "train on encodings of NeMo or MLPerf, which name no VAE or encoder"),
    *group(
        "train",
        used("dataset_path", PATHS, None, "shards or cache, tars, wdinfo.pkl; here or at s3://...", also=["path"]),
        used(
            "weights",
            nullable(list_of(number(0), least=1)),
            None,
            "how often each set of dataset_path is drawn from, in proportion; null: all samples alike",
            also=["mix", "proportions"],
        ),
        *group("augmentations", *AUGMENTATIONS),
        *FILTERINGS,
        no_effect("data_sharding", flag(), True, "NeMo: tars by process", ONE_LOADER),
    ),
    *group(
        "validation",
        used("dataset_path", PATHS, None, "a set held out from training, for validation; null for none"),
        no_effect("data_path", PATHS, None, "NeMo's switch for validation", "dataset_path alone decides"),
        *group("augmentations", *AUGMENTATIONS),
        refused("filterings", mapping(), {}, "leave pictures out by size", "a validation takes its whole set"),
    ),
    *group(  # sets at an address such as s3://bucket/folder
        "remote",
        used("cache_dir", nullable(text()), None, "copies of remote shards; null: in the user's cache folder"),
        used("cache_gib", number(0), 50.0, "their size at most; a set that is larger is read in ranges of bytes"),
    ),
    *group(  # what precache makes; training reads of the cache itself what it holds
        "cache",
        used("latents", choice("moments", "mean"), "moments", "mean: half as large, the same latent every time"),
        used("crops", whole(1), 1, "random crops kept of each picture; training takes one of them each time"),
        used("flipped", flag(), False, "every picture mirrored as well, where horizontal_flip mirrors half of them"),
        used("share_captions", flag(), False, "equal captions of a shard are encoded and stored once"),
    ),
    *group(
        "webdataset",
        used("local_root_path", nullable(text()), None, "folder that a relative dataset_path starts from"),
        no_effect("infinite_sampler", flag(), False, "NeMo: shards drawn with replacement", ONE_LOADER),
        no_effect("chunk_size", whole(1), 1000, "samples of one tar", "counted in the shards' index"),
    ),
)
