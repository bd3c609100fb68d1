"""The server's dialects, spoken by the real clients; images equal those of a pipeline for the same seed."""

import base64
import io
import json

import httpx
import numpy as np
import openai
import pytest
import webuiapi
from huggingface_hub import InferenceClient
from PIL import Image

OPTIONS = dict(num_inference_steps=4, guidance_scale=3.0, width=16, height=24)


def picked(image):
    return np.asarray(image, dtype=int)


def decoded(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def same(found, expected):
    return picked(found).shape == picked(expected).shape and abs(picked(found) - picked(expected)).max() <= 1


@pytest.fixture(scope="module")
def expected(pipeline):
    return pipeline("a red circle", seed=7, num_images_per_prompt=2, **OPTIONS).images


@pytest.fixture
def client(running):
    return openai.OpenAI(base_url=f"{running[0]}/v1", api_key="any")


def test_openai_generates(client, expected):
    more = {"seed": 7, "steps": 4, "cfg_scale": 3.0}
    found = client.images.generate(model="tiny", prompt="a red circle", n=2, size="16x24", extra_body=more)
    images = [decoded(each.b64_json) for each in found.data]
    assert all(map(same, images, expected))
    assert json.loads(images[1].info["latentsmith"])["seed"] == 8
    assert "Seed: 8" in images[1].info["parameters"]


def test_openai_lists_models(client):
    assert [each.id for each in client.models.list().data] == ["tiny", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.models.retrieve("gpt")


def test_openai_edits_what_is_transparent(client, pipeline, expected):
    image = expected[0]
    mask = image.convert("RGBA")
    mask.putalpha(Image.fromarray(np.repeat([[0] * 8 + [255] * 8], 24, 0).astype(np.uint8)))
    files = dict(image=("i.png", png(image), "image/png"), mask=("m.png", png(mask), "image/png"))
    more = {"seed": 3, "steps": 4, "cfg_scale": 3.0, "strength": 1.0}
    found = decoded(client.images.edit(prompt="a cat", extra_body=more, **files).data[0].b64_json)
    white = Image.fromarray(np.repeat([[255] * 8 + [0] * 8], 24, 0).astype(np.uint8))
    options = dict(num_inference_steps=4, guidance_scale=3.0, strength=1.0)
    assert same(found, pipeline("a cat", image=image, mask_image=white, seed=3, **options).images[0])
    assert (picked(found)[:, 8:] == picked(image)[:, 8:]).all()


@pytest.mark.parametrize("given, message", [
    (dict(size="16"), "WIDTHxHEIGHT"),
    (dict(size="16x16", n=9), "at most 8"),
    (dict(size="128x128"), "at most 4,096 pixels"),
    (dict(size="16x16", response_format="url"), "b64_json"),
    (dict(size="16x16", quality="hd"), "hd"),
])  # fmt: skip
def test_openai_is_told_what_cannot_be(client, given, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.images.generate(prompt="a cat", **given)


@pytest.fixture
def web_ui(running):
    return webuiapi.WebUIApi(baseurl=f"{running[0]}/sdapi/v1", sampler="DPM++ 2M", steps=4)


def test_web_ui_text_to_image(web_ui, expected):
    found = web_ui.txt2img(prompt="a red circle", seed=7, cfg_scale=3.0, width=16, height=24, batch_size=2)
    assert all(map(same, found.images, expected))
    assert found.info["all_seeds"] == [7, 8]
    assert "Seed: 8" in found.info["infotexts"][1]


def test_web_ui_weights_and_karras(web_ui, pipeline):
    found = web_ui.txt2img(
        prompt="a (red:1.3) circle",
        seed=2,
        cfg_scale=3.0,
        width=16,
        height=16,
        sampler_name="Euler a",
        scheduler="karras",
    )
    options = OPTIONS | dict(height=16, seed=2, sampler="euler_a karras", prompt_syntax="webui")
    assert same(found.image, pipeline("a (red:1.3) circle", **options).images[0])


def test_web_ui_image_to_image(web_ui, pipeline, expected):
    given = dict(images=[expected[0]], seed=3, cfg_scale=3.0, width=16, height=24, denoising_strength=0.75)
    options = OPTIONS | dict(image=expected[0], strength=0.75, seed=3)
    assert same(web_ui.img2img(prompt="a cat", **given).image, pipeline("a cat", **options).images[0])
    mask = Image.fromarray(np.repeat([[255] * 8 + [0] * 8], 24, 0).astype(np.uint8))
    masked = dict(mask_image=mask, mask_blur=0, inpaint_full_res=False)
    found = web_ui.img2img(prompt="a cat", **given, **masked).image
    assert same(found, pipeline("a cat", **options, mask_image=mask).images[0])


def test_web_ui_repaints_the_region_of_a_mask_at_full_size(web_ui, expected):
    image = expected[0].resize((64, 48))
    mask = Image.new("L", image.size)
    mask.paste(255, (40, 8, 56, 24))
    given = dict(images=[image], mask_image=mask, mask_blur=0, seed=3, width=16, height=16, denoising_strength=1.0)
    found = picked(web_ui.img2img(prompt="a cat", inpaint_full_res=True, inpaint_full_res_padding=4, **given).image)
    outside = np.asarray(mask) == 0
    assert (found[outside] == picked(image)[outside]).all()
    assert abs(found[~outside] - picked(image)[~outside]).mean() > 5


def test_web_ui_looks_and_switches(web_ui, running, expected):
    assert web_ui.util_get_model_names() == ["other", "tiny"]
    assert "Euler a" in web_ui.util_get_sampler_names()
    web_ui.util_set_model("other")
    assert web_ui.util_get_current_model() == "other"
    other = web_ui.txt2img(prompt="a red circle", seed=7, cfg_scale=3.0, width=16, height=24).image
    assert not same(other, expected[0])
    web_ui.util_set_model("tiny")
    assert web_ui.get_progress()["progress"] == 0
    assert web_ui.get_memory()["ram"]["used"] > 0
    assert web_ui.get_loras() == [] and web_ui.get_cmd_flags()["api"]
    found = decoded(httpx.post(f"{running[0]}/v1/images/generations", json={"prompt": "a", "size": "16x16", "steps": 2},
                               timeout=600).json()["data"][0]["b64_json"])  # fmt: skip
    assert "Steps: 2" in web_ui.png_info(found).info


def test_web_ui_is_told_what_is_not_offered(web_ui):
    with pytest.raises(RuntimeError, match="enable_hr is not offered"):
        web_ui.txt2img(prompt="a cat", enable_hr=True)
    with pytest.raises(RuntimeError, match="styles is not offered"):
        web_ui.txt2img(prompt="a cat", styles=["oil"])


def test_hugging_face_text_to_image(running, expected):
    hub = InferenceClient(model=running[0])
    image = hub.text_to_image("a red circle", seed=7, **OPTIONS)
    assert same(image, expected[0])


def test_a_job_is_followed_to_its_images(running, expected):
    url = running[0]
    given = {"prompt": "a red circle", "seed": 7, "num_images_per_prompt": 2, "previews": True, **OPTIONS}
    job = httpx.post(f"{url}/v1/jobs", json=given).json()
    with httpx.stream("GET", f"{url}/v1/jobs/{job['id']}/events", timeout=600) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert [each["step"] for each in events] == sorted(each["step"] for each in events)
    assert events[-1]["status"] == "done" and events[-1]["step"] == 8
    assert any("preview" in each for each in events)
    for path, image in zip(events[-1]["images"], expected, strict=True):
        assert same(Image.open(io.BytesIO(httpx.get(url + path).content)), image)


def test_a_job_can_be_cancelled(running):
    url = running[0]
    jobs = [
        httpx.post(f"{url}/v1/jobs", json={"prompt": "a cat", "steps": 40, "width": 64, "height": 64}).json()
        for _ in range(6)
    ]
    for job in jobs:
        assert httpx.delete(f"{url}/v1/jobs/{job['id']}").status_code == 200
    last = jobs[-1]["id"]  # waits for the others: four run at once
    with httpx.stream("GET", f"{url}/v1/jobs/{last}/events", timeout=600) as stream:
        assert '"cancelled"' in [*stream.iter_lines()][-2]
    assert httpx.get(f"{url}/v1/jobs/{'0' * 32}").status_code == 404
