"""`latentsmith data ...`: sets of images and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make sets of captioned images.", no_args_is_help=True, rich_markup_mode=None)

Source = Annotated[
    str,
    typer.Argument(help="Folder of images with captions, a CSV, JSONL or parquet table, or tars; here or at s3://..."),
]
Out = Annotated[Path, typer.Argument(help="Folder to write.")]
Count = Annotated[int, typer.Option("--count", "-n", min=1, help="How many.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Another seed draws other scenes.")]


@app.command("import")
def import_(
    source: Source,
    out: Out,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in one tar.")] = 1000,
    max_bad: Annotated[int | None, typer.Option(min=0, help="Stop once more than this many are set aside.")] = None,
    no_duplicates: Annotated[bool, typer.Option("--no-duplicates", help="Keep the first of equal images.")] = False,
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Read links out of the source folder.")] = False,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Read table entries that are absolute paths or use `..`.")
    ] = False,
    no_captions: Annotated[bool, typer.Option("--no-captions", help="Take the images alone, for train-vae.")] = False,
    min_size: Annotated[int, typer.Option(min=1, help="Pixels of the shorter side, at least.")] = 1,
    max_size: Annotated[int | None, typer.Option(min=1, help="Pixels of the shorter side, at most.")] = None,
    max_aspect: Annotated[float | None, typer.Option(min=1, help="Longer over shorter side, at most. [20]")] = None,
    min_caption: Annotated[int, typer.Option(min=1, help="Characters of a caption, at least.")] = 1,
    max_caption: Annotated[int | None, typer.Option(min=1, help="Characters of a caption, at most.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="On JSON or columns: language=en, aesthetic>=5.")] = None,
) -> None:
    """Turn images and captions into indexed shards; what cannot be read is set aside with its reason.

    \b
    Examples:
      latentsmith data import photos shards            photos/a.jpg beside photos/a.txt
      latentsmith data import photos/captions.csv shards
      latentsmith data import metadata.jsonl shards --max-bad 100 --no-duplicates
      latentsmith data import laion shards --min-size 512 --max-aspect 2 --where language=en --where "aesthetic>=5"
    """
    from latentsmith.data.filters import Filters
    from latentsmith.data.ingest import import_data

    import_data(
        source,
        out,
        samples_per_shard=samples_per_shard,
        max_bad=max_bad,
        filters=Filters(min_size, max_size, max_aspect, min_caption, max_caption, tuple(where or ())),
        keep_duplicates=not no_duplicates,
        follow_links=follow_links,
        allow_outside=allow_outside,
        captions=not no_captions,
    )


@app.command()
def scenes(
    out: Out,
    count: Count = 1000,
    seed: Seed = 0,
    doodles: Annotated[float, typer.Option(min=0, max=1, help="Share of free drawings, to train a VAE on.")] = 0.0,
) -> None:
    """Draw synthetic scenes with their captions: a folder that `data import` reads.

    \b
    Examples:
      latentsmith data scenes scenes --count 5000
      latentsmith data scenes images --count 20000 --seed 1 --doodles 0.5
    """
    from latentsmith.demo.scenes import write_scenes

    write_scenes(out, count, seed, doodles=doodles)
    print(f"{out}: {count:,} images with captions")


@app.command()
def vocabulary(
    source: Annotated[Path, typer.Argument(metavar="SET", help="Shards whose captions are read.")],
    out: Annotated[Path, typer.Argument(help="Folder, or tokenizer.json, to write.")],
    size: Annotated[int, typer.Option(min=1, help="Tokens in all.")] = 1000,
) -> None:
    """Learn a small vocabulary from a set's captions, for a text encoder trained from nothing.

    \b
    Examples:
      latentsmith data vocabulary shards tokenizer --size 200
    """
    from latentsmith.data.ingest import train_vocabulary

    train_vocabulary(source, out, size=size)
