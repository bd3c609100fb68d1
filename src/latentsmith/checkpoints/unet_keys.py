"""U-Net key tables: canonical (LDM) names against diffusers' and NeMo's, for a U-Net of any size.

Every table is computed forwards from the canonical names the model itself has, so block counts, depths and widths are
whatever they are, and the same table read backwards exports.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)")
FUSED = [(r"\bin_layers\.2\.", "in_layers.1."), (r"\bout_layers\.3\.", "out_layers.2."), (r"^out\.2\.", "out.1.")]
MOVED = [
    (r"(transformer_blocks\.\d+)\.norm1\.", r"\1.attn1.norm."),
    (r"(transformer_blocks\.\d+)\.norm2\.", r"\1.attn2.norm."),
    (r"(transformer_blocks\.\d+)\.norm3\.", r"\1.ff.net.LN."),
    (r"\bff\.net\.2\.", "ff.net.3."),
    (r"\bff\.net\.0\.proj\.", "ff.net.1.proj."),
    (r"\bff\.net\.LN\.", "ff.net.0."),
]
TRANSFORMER_ENGINE = [  # on top of MOVED
    (r"(\.attn[12])\.norm\.", r"\1.norm_to_q.layer_norm_"),
    (r"(\.attn[12])\.to_q\.", r"\1.norm_to_q."),
    (r"\bff\.net\.0\.", "ff.net.layer_norm_"),
    (r"\bff\.net\.1\.proj\.", "ff.net.fc1_"),
    (r"\bff\.net\.3\.", "ff.net.fc2_"),
]


@dataclass(frozen=True)
class UNetDialect:
    """Which grammar a U-Net's names follow. NeMo's three departures from LDM come and go independently."""

    diffusers: bool = False
    fused: bool = False  # SiLU inside GroupNorm: in_layers.2 -> in_layers.1
    moved: bool = False  # LayerNorms inside the sub-module they precede
    transformer_engine: bool = False  # fp8 spelling of the moved norms and the Linears after them

    @property
    def nemo(self) -> bool:
        return self.fused or self.moved or self.transformer_engine

    def __str__(self) -> str:
        axes = [axis for axis in ("fused", "moved", "transformer_engine") if getattr(self, axis)]
        return "diffusers" if self.diffusers else f"NeMo ({', '.join(axes)})" if axes else "LDM"


NEMO_V2 = UNetDialect(fused=True, moved=True)
DIFFUSERS = UNetDialect(diffusers=True)


def detect(keys: Collection[str]) -> UNetDialect:
    """The dialect of a U-Net's keys, prefixes already gone."""
    has = lambda pattern: any(re.search(pattern, key) for key in keys)  # noqa: E731
    return UNetDialect(
        diffusers=has(r"^(down_blocks|up_blocks|mid_block|conv_in|time_embedding)\."),
        fused=has(r"\bin_layers\.1\.|\bout_layers\.2\.|^out\.1\."),
        moved=has(r"\.attn[12]\.(norm|norm_to_q)\.|\bff\.net\.(3|1\.proj)\.|\bff\.net\.fc[12]_"),
        transformer_engine=has(r"\.norm_to_q\.|\bff\.net\.fc[12]_"),
    )


def rename(names: Iterable[str], dialect: UNetDialect) -> dict[str, str]:
    """Canonical name -> the same tensor's name in `dialect`, for every name of one U-Net."""
    if dialect.diffusers:
        return _to_diffusers(list(names))
    rules = FUSED * dialect.fused + MOVED * dialect.moved + TRANSFORMER_ENGINE * dialect.transformer_engine
    return {name: _apply(rules, name) for name in names}


def _apply(rules: list[tuple[str, str]], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _to_diffusers(names: list[str]) -> dict[str, str]:
    modules = dict(_diffusers_modules(_submodules(names)))
    table = {}
    for name in names:
        module = _module(name)
        if module in modules:
            table[name] = modules[module] + _inner(name.removeprefix(module))
        else:
            outer, _, tensor = name.rpartition(".")
            table[name] = f"{OUTER.get(outer, outer)}.{tensor}"
    return table


def _module(name: str) -> str | None:
    """`input_blocks.4.0`, `middle_block.1`: the residual block, transformer or resampler a name belongs to."""
    match = re.match(r"((?:input|output)_blocks\.(?!0\.0\.(?:weight|bias))\d+\.\d+|middle_block\.\d+)\.", name)
    return match[1] if match and not name.startswith("input_blocks.0.") else None


def _submodules(names: Iterable[str]) -> dict[str, str]:
    """Module -> its kind ("resnet", "attention", "down" or "up"), in order of block and sub-index."""
    kinds: dict[str, str] = {}
    for name in names:
        if module := _module(name):
            inner = name.removeprefix(f"{module}.").split(".")[0]
            kinds[module] = {"op": "down", "conv": "up"}.get(inner) or ("resnet" if _is_resnet(inner) else "attention")
    return {
        module: kinds[module] for module in sorted(kinds, key=lambda path: [int(n) for n in re.findall(r"\d+", path)])
    }


def _is_resnet(inner: str) -> bool:
    return inner in {"in_layers", "out_layers", "emb_layers", "skip_connection"}


def _inner(rest: str) -> str:
    """After a module: residual blocks rename it, transformers keep it, a resampler has one conv and no name."""
    path, _, tensor = rest.removeprefix(".").rpartition(".")
    return f".{tensor}" if path in ("op", "conv") else f".{RESNET.get(path, path)}.{tensor}"


def _diffusers_modules(kinds: dict[str, str]) -> Iterator[tuple[str, str]]:
    yield from _side(kinds, "input_blocks", "down_blocks", "down", "downsamplers.0.conv")
    yield from _side(kinds, "output_blocks", "up_blocks", "up", "upsamplers.0.conv")
    counts = {"resnet": 0, "attention": 0}
    for module, kind in kinds.items():
        if module.startswith("middle_block."):
            yield module, f"mid_block.{kind}s.{counts[kind]}"
            counts[kind] += 1


def _side(kinds: dict[str, str], ours: str, theirs: str, resampler: str, resampled: str) -> Iterator[tuple[str, str]]:
    """One side of the U: a resampler closes its level; residual blocks are numbered within the level."""
    level, resnet = 0, -1
    for module, kind in kinds.items():
        if not module.startswith(f"{ours}."):
            continue
        resnet += kind == "resnet"
        yield module, f"{theirs}.{level}.{resampled if kind == resampler else f'{kind}s.{resnet}'}"
        if kind == resampler:
            level, resnet = level + 1, -1
