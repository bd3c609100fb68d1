import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from latentsmith.diffusion import Denoiser, GuidedDenoiser, NoiseSchedule

SCHEDULE = NoiseSchedule.from_config(0.00085, 0.012)
NOISY = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
PROMPTS, NULL = torch.tensor([[1.0], [2.0]]), torch.tensor([[-0.5]])


class Network:
    """Says something that depends on its context; counts the samples of each call."""

    def __init__(self):
        self.batches = []

    def __call__(self, noisy, timesteps, context):
        self.batches.append(len(noisy))
        return noisy.sin() + context.view(-1, 1, 1, 1) * noisy.cos()


def guided(scale, network=None, prediction_type="epsilon", **options):
    denoiser = Denoiser(network or Network(), SCHEDULE, prediction_type)
    return GuidedDenoiser(denoiser, {"context": PROMPTS}, {"context": NULL}, scale, **options)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_guidance_is_uncond_plus_scale_times_difference(prediction_type):
    denoiser = Denoiser(Network(), SCHEDULE, prediction_type)
    conditional, unconditional = denoiser(NOISY, 2.0, context=PROMPTS), denoiser(NOISY, 2.0, context=NULL)
    expected = unconditional + 7.5 * (conditional - unconditional)
    for one_batch in (True, False):
        ours = guided(7.5, prediction_type=prediction_type, one_batch=one_batch)(NOISY, 2.0)
        torch.testing.assert_close(ours, expected)


def test_calls_and_their_batches():
    for options, batches in (({"one_batch": True}, [4]), ({"one_batch": False}, [2, 2])):
        network = Network()
        guided(7.5, network, **options)(NOISY, 2.0)
        assert network.batches == batches
    for off in (1, torch.ones(2)):
        network = Network()
        result = guided(off, network)(NOISY, 2.0)
        assert network.batches == [2]
        torch.testing.assert_close(result, Denoiser(Network(), SCHEDULE)(NOISY, 2.0, context=PROMPTS))


def test_each_prompt_may_have_its_own_scale():
    together = guided(torch.tensor([1.0, 9.0]))(NOISY, 2.0)
    torch.testing.assert_close(together[0], guided(1.0)(NOISY, 2.0)[0])
    torch.testing.assert_close(together[1], guided(9.0)(NOISY, 2.0)[1])


def test_a_sigma_for_each_sample_and_a_window_of_several_states():
    window, sigmas = torch.cat([NOISY, NOISY * 2]), torch.tensor([1.0, 1.0, 3.0, 3.0]).double()
    ours = guided(torch.tensor([2.0, 5.0]))(window, sigmas)
    torch.testing.assert_close(ours[:2], guided(torch.tensor([2.0, 5.0]))(NOISY, 1.0))
    torch.testing.assert_close(ours[2:], guided(torch.tensor([2.0, 5.0]))(NOISY * 2, 3.0))


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescale_equals_diffusers(rescale):
    denoiser = Denoiser(Network(), SCHEDULE, "v_prediction")
    conditional, unconditional = denoiser.output(NOISY, 2.0, context=PROMPTS), denoiser.output(NOISY, 2.0, context=NULL)
    output = rescale_noise_cfg(unconditional + 7.5 * (conditional - unconditional), conditional, rescale)
    ours = guided(7.5, prediction_type="v_prediction", rescale=rescale)(NOISY, 2.0)
    torch.testing.assert_close(ours, denoiser.from_output(output, NOISY, 2.0))


def test_without_a_null_text_there_is_no_guidance():
    denoiser = Denoiser(Network(), SCHEDULE)
    assert GuidedDenoiser(denoiser, {"context": PROMPTS}, None, 1.0)(NOISY, 2.0).shape == NOISY.shape
    with pytest.raises(ValueError, match="needs null_conditioning"):
        GuidedDenoiser(denoiser, {"context": PROMPTS}, None, 2.0)


def test_settings_that_are_no_guidance():
    with pytest.raises(ValueError, match="guidance_scale is nan; it must be a finite number"):
        guided(float("nan"))
    with pytest.raises(ValueError, match=r"guidance rescale is 1\.5; it must be between 0 and 1"):
        guided(2.0, rescale=1.5)
    long = {"context": torch.zeros(2, 154, 8)}
    short = {"context": torch.zeros(2, 77, 8)}
    with pytest.raises(ValueError, match=r"\(2, 154, 8\) with prompts and \(2, 77, 8\) without"):
        GuidedDenoiser(Denoiser(Network(), SCHEDULE), long, short, 2.0)(NOISY, 1.0)
    with pytest.raises(ValueError, match="give both the same"):
        GuidedDenoiser(Denoiser(Network(), SCHEDULE), long, {"tokens": NULL}, 2.0)(NOISY, 1.0)
