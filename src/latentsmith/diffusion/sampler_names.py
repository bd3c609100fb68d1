"""What people call the samplers: NeMo, diffusers, web UIs and ComfyUI each have their words."""

import re
from collections.abc import Collection
from difflib import get_close_matches

_ALIASES = {
    "dpm": "dpmsolver++",  # NeMo
    "dpmsolver": "dpmsolver++",
    "dpm++": "dpmsolver++",
    "dpm++_2m": "dpmsolver++",
    "dpmpp_2m": "dpmsolver++",
    "dpmsolvermultistep": "dpmsolver++",
    "dpm++_2m_sde": "dpmsolver++_sde",
    "dpmpp_2m_sde": "dpmsolver++_sde",
    "dpmsolver++_2m": "dpmsolver++",
    "dpmsolver++_2m_sde": "dpmsolver++_sde",
    "dpm++_2s": "dpmsolver++_singlestep",
    "dpmsolversinglestep": "dpmsolver++_singlestep",
    "euler_ancestral": "euler_a",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_euler_ancestral": "euler_a",
    "k_heun": "heun",
    "k_lms": "lms",
    "eulerdiscrete": "euler",
    "eulerancestraldiscrete": "euler_a",
    "heundiscrete": "heun",
    "lmsdiscrete": "lms",
    "pndm": "plms",
    "uni_pc": "unipc",
    "unipcmultistep": "unipc",
    "paraddim": "para_ddim",
    "ddimparallel": "para_ddim",
}


def canonical_sampler(name: str, known: Collection[str]) -> tuple[str, bool]:
    """One of the known names, and whether `name` asks for Karras sigmas ("DPM++ 2M Karras").

    Case, and the choice between space, hyphen and underscore, do not matter; diffusers' class names are understood.
    Raises ValueError, with the nearest names, for what is no sampler.
    """
    plain = re.sub(r"[\s_-]+", "_", name.strip().lower()).removesuffix("scheduler")
    base = plain.removesuffix("_karras")
    found = _ALIASES.get(base, base)
    if found in known:
        return found, base != plain
    near = list(dict.fromkeys(_ALIASES.get(word, word) for word in get_close_matches(base, [*known, *_ALIASES], n=5)))
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
    raise ValueError(f"{name!r} is not a sampler; {hint}")
