import pytest
import torch

from latentsmith.diffusion import (
    SAMPLERS,
    NoiseSchedule,
    Step,
    canonical_sampler,
    sample,
    samplers,
    sampling_schedule,
)


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
        ("DPM++ 2S Karras", ("dpmsolver++_singlestep", True)),
        ("dpmpp_2s", ("dpmsolver++_singlestep", False)),
        ("dpmsolver++_2s", ("dpmsolver++_singlestep", False)),
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
    assert canonical_sampler(name) == expected


def test_no_name_means_two_samplers():
    names = [name for key, sampler in SAMPLERS.items() for name in (key, *sampler.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("key", SAMPLERS)
def test_the_title_in_an_images_metadata_names_the_sampler(key):
    found = canonical_sampler(SAMPLERS[key].title)[0]
    assert found == ("ddim" if key == "para_ddim" else key)  # which computes DDIM, and has its title


def test_ancestral_samplers_of_web_uis_are_not_taken_for_plain_ones():
    with pytest.raises(ValueError, match="'DPM\\+\\+ 2S a' is not a sampler; did you mean dpmsolver"):
        canonical_sampler("DPM++ 2S a")


def test_a_sampler_is_added_by_its_registration(monkeypatch):
    """Names, schedule and run follow from the entry alone."""
    monkeypatch.setitem(SAMPLERS, "mine", None)

    @samplers.register("mine", samplers.LEADING, "My Sampler", ["my_sampler"])
    def sample_mine(denoise, latents, sigmas):
        for index in range(len(sigmas) - 1):
            yield Step(index, latents, denoise(latents, sigmas[index].item()))

    assert canonical_sampler("My Sampler Karras") == ("mine", True)
    schedule = sampling_schedule(NoiseSchedule.from_config(), "my_sampler", 3)
    assert len(list(sample("mine", lambda noisy, sigma: noisy, torch.zeros(1, 4, 2, 2), schedule))) == 3


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="'eulre' is not a sampler; did you mean euler"):
        canonical_sampler("eulre")
    with pytest.raises(ValueError, match="'???' is not a sampler; choose from ddim, ddpm".replace("?", r"\?")):
        canonical_sampler("???")
