import pytest

from latentsmith.diffusion import SAMPLERS, canonical_sampler
from latentsmith.diffusion.sampler_names import _ALIASES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DDIM", ("ddim", False)),
        ("PLMS", ("plms", False)),
        ("DPM", ("dpmsolver++", False)),
        ("PARA_DDIM", ("para_ddim", False)),
        ("DPM++ 2M", ("dpmsolver++", False)),
        ("DPM++ 2M Karras", ("dpmsolver++", True)),
        ("DPM++ 2M SDE Karras", ("dpmsolver++_sde", True)),
        ("dpmpp_2m_karras", ("dpmsolver++", True)),
        ("Euler a", ("euler_a", False)),
        ("LMS Karras", ("lms", True)),
        ("UniPC", ("unipc", False)),
        ("DPMSolverMultistepScheduler", ("dpmsolver++", False)),
        ("EulerAncestralDiscreteScheduler", ("euler_a", False)),
        ("PNDMScheduler", ("plms", False)),
        (" heun ", ("heun", False)),
    ],
)
def test_the_words_of_other_programs(name, expected):
    assert canonical_sampler(name, SAMPLERS) == expected


def test_every_alias_leads_somewhere_and_hides_no_sampler():
    assert set(_ALIASES.values()) <= set(SAMPLERS) and not set(_ALIASES) & set(SAMPLERS)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="'eulre' is not a sampler; did you mean euler"):
        canonical_sampler("eulre", SAMPLERS)
    with pytest.raises(ValueError, match="'???' is not a sampler; choose from ddim, ddpm".replace("?", r"\?")):
        canonical_sampler("???", SAMPLERS)
