"""Commands gathered, and errors turned into one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import typer

from latentsmith.cpu.allocator import ask_for_huge_pages, keep_freed_memory
from latentsmith.files.errors import BadInput, Stopped

from . import configs, convert, data, demo, evaluate, generate, inspect, precache, serve, train
from .streams import protect_streams

TRAINING = ("train", "train-vae", "demo")  # steps of one size, again and again
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="latentsmith",
    help="Train, fine-tune and run Stable Diffusion v1 and v2.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 75 stopped and asks to be queued again, 130 interrupted. "
    "Any command takes --debug, which shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command("train")(train.train)
app.command("train-vae")(train.train_vae)
app.command()(precache.precache)
app.command()(generate.generate)
app.command()(evaluate.evaluate)
app.command()(convert.convert)
app.command()(inspect.inspect)
app.command()(serve.serve)
app.add_typer(data.app, name="data")
app.add_typer(configs.app, name="config")


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from latentsmith import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # a process of our own, in which nothing has imported torch yet
        protect_streams(argv[0] if argv else "--help")
        ask_for_huge_pages()
        if argv[:1] and argv[0] in TRAINING:
            keep_freed_memory()
    debug = "--debug" in argv
    arguments = [item for item in argv if item != "--debug"]
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {_one_line(str(message))}", file=sys.stderr)
        return exit_code(lambda: _run(arguments), debug=debug)


def _run(arguments: list[str]) -> Any:
    try:
        return typer.main.get_command(app)(arguments, standalone_mode=False)
    except Exception as error:
        if hint := _config_option(error, arguments):
            raise BadInput(hint) from None
        raise


def _config_option(error: Any, arguments: list[str]) -> str | None:
    """Return how to write an unknown `--option` of a command that takes a config as an option of the config."""
    takes_config = getattr(error, "ctx", None) and any(each.name == "overrides" for each in error.ctx.command.params)
    if type(error).__name__ != "NoSuchOption" or not takes_config:
        return None
    from latentsmith.config.schema import named

    option = named(error.option_name.lstrip("-").replace("-", "_"))
    if option is None:
        return None
    start = next(i for i, argument in enumerate(arguments) if argument.startswith(error.option_name))
    word, *after = arguments[start:]
    value = word.partition("=")[2] or next((each for each in after[:1] if not each.startswith("--")), "VALUE")
    return f"{error.option_name}: use {option.key}={value}"


def exit_code(run: Callable[[], Any], *, debug: bool = False) -> int:
    """Call `run` and return its exit code; an error becomes one line on stderr, after its traceback if `debug`."""
    try:
        code = run()
        if code == INTERRUPTED:  # how newer typers report Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else DONE
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `latentsmith config show sd1 | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Stopped as stopped:
        print(f"latentsmith: {stopped}", file=sys.stderr)
        return stopped.code
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = _describe(error)
        print(f"latentsmith: {message}", file=sys.stderr)
        return code


def _describe(error: Exception) -> tuple[str, int]:
    """Return one line for a person, and the exit code."""
    if isinstance(error, BadInput):
        return _one_line(str(error)), BAD_INPUT
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing argument
        return _one_line(error.format_message()), BAD_INPUT
    if isinstance(error, OSError) and error.filename and error.strerror:
        return _one_line(f"{error.filename}: {error.strerror}"), FAILED
    return f"{type(error).__name__}: {_one_line(str(error))} (--debug shows where)", FAILED


def _one_line(text: str) -> str:
    return " ".join(text.split())
