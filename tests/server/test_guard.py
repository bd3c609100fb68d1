"""Who may call the server, and what hostile requests get."""

import asyncio
import json

import httpx
import pytest

from latentsmith.cli import main
from latentsmith.cli.serve import hosts_of
from latentsmith.server.app import build_app

BOMB = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00" + b"\x00" * 40


def post(url, path, **more):
    return httpx.post(url + path, timeout=600, **more)


HOSTILE = [
    ({"prompt": 5}, 400), ({"prompt": None}, 400), ({"prompt": ["a"]}, 400), ({}, 400), ([], 400),
    ("a", 400), (None, 400),
    ({"prompt": "a", "steps": 10**9}, 400), ({"prompt": "a", "steps": -1}, 400), ({"prompt": "a", "steps": "5"}, 400),
    ({"prompt": "a", "n": 10**9}, 400), ({"prompt": "a", "n": 0}, 400), ({"prompt": "a", "n": True}, 400),
    ({"prompt": "a", "n": 1.5}, 400), ({"prompt": "a", "size": "../../etc/passwd"}, 400),
    ({"prompt": "a", "size": "99999x99999"}, 400), ({"prompt": "a", "size": "0x0"}, 400),
    ({"prompt": "a", "size": 5}, 400),
    ({"prompt": "a", "width": 10**30, "height": 8}, 400), ({"prompt": "a", "size": "15x15"}, 400),
    ({"prompt": "a", "model": "../../etc/passwd"}, 404), ({"prompt": "a", "model": "/etc/passwd"}, 404),
    ({"prompt": "a", "model": ["tiny"]}, 400),
    ({"prompt": "a", "model": {"a": 1}}, 400), ({"prompt": "a", "model": 3}, 400),
    ({"prompt": "a", "seed": 2**70}, 400), ({"prompt": "a", "seed": -5}, 400), ({"prompt": "a", "seed": "x"}, 400),
    ({"prompt": "a", "sampler": "__import__"}, 400), ({"prompt": "a", "sampler": []}, 400),
    ({"prompt": "a", "guidance_scale": "NaN"}, 400), ({"prompt": "a", "guidance_scale": [1, 2]}, 400),
    ({"prompt": "a", "latents": [[1]]}, 400), ({"prompt": "a", "generator": 1}, 400),
    ({"prompt": "a", "batch_size": 1}, 400),
    ({"prompt": "a", "image": "/etc/passwd"}, 400), ({"prompt": "a", "image": "http://127.0.0.1/"}, 400),
    ({"prompt": "a", "x" * 1000: 1}, 400), ({"prompt": "a" * 200_000}, 400), ({"prompt": "a", "stream": True}, 400),
    ({"prompt": "a", "output_format": "svg"}, 400), ({"prompt": "a", "negative_prompt": 7}, 400),
    ({"prompt": "a", "eta": float("nan")}, 400), ({"prompt": "a", "strength": float("inf")}, 400),
]  # fmt: skip


@pytest.mark.parametrize("body, status", HOSTILE, ids=lambda each: str(each)[:50])
def test_hostile_json(running, body, status):
    answer = post(
        running[0], "/v1/images/generations", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert found["detail"] == found["error"]["message"]
    assert "Traceback" not in answer.text and "/work" not in answer.text and "site-packages" not in answer.text


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}'])
def test_bodies_that_are_not_json(running, content):
    assert post(running[0], "/v1/images/generations", content=content).status_code == 400


@pytest.mark.parametrize("path, status", [
    ("/v1/jobs/../../etc/passwd", 404), ("/v1/jobs/%2e%2e%2fetc%2fpasswd", 404), ("/etc/passwd", 404),
    ("/page.js/../../app.py", 404), ("/%2e%2e/app.py", 404), ("/sdapi/v1/loras/x", 404), ("/docs", 404),
    ("/openapi.json", 404), ("/v1/images/generations", 405), ("/v1/models/..%2f..", 404),
])  # fmt: skip
def test_paths_that_are_none(running, path, status):
    answer = httpx.get(running[0] + path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("image", [b"%!PS-Adobe-3.0\n", b"not an image", BOMB, b"", b"GIF89a"])
def test_images_that_are_none(running, image):
    answer = post(running[0], "/v1/images/edits", data={"prompt": "a"}, files={"image": ("a.png", image, "image/png")})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("image")


def test_a_large_body_is_refused_before_it_is_read(running):
    large = post(running[0], "/v1/images/generations", content=b"x" * (2**20 + 1))
    assert large.status_code == 413

    def chunks():
        for _ in range(40):
            yield b"x" * 2**15

    assert post(running[0], "/v1/images/generations", content=chunks()).status_code == 413


@pytest.mark.parametrize("headers, status", [
    ({"host": "evil.example"}, 421), ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403),
    ({"host": "127.0.0.1.evil.example"}, 421), ({"host": ""}, 421),
])  # fmt: skip
def test_other_sites_cannot_use_it(running, headers, status):
    assert httpx.get(f"{running[0]}/v1/models", headers=headers).status_code == status


def test_the_page_loads_nothing_from_elsewhere(running):
    answer = httpx.get(running[0])
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "access-control-allow-origin" not in answer.headers
    assert "http" + "://" not in answer.text and "https://" not in answer.text


def test_it_still_serves(running):
    """After all of the above."""
    assert httpx.get(f"{running[0]}/health").json() == {"status": "ok"}
    assert httpx.get(f"{running[0]}/ready").json()["loaded"]
    assert 'latentsmith_requests_total{status="404"}' in httpx.get(f"{running[0]}/metrics").text


def test_with_a_key(running):
    app = build_app(running[1], api_key="secret", hosts=None)

    async def statuses():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://any") as client:
            given = [{}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer secret"}, {"x-api-key": "secret"}]
            answers = [(await client.get("/v1/models", headers=each)).status_code for each in given]
            return [*answers, (await client.get("/health")).status_code]

    assert asyncio.run(statuses()) == [401, 401, 200, 200, 200]


def test_beyond_this_machine_it_asks_for_a_key(capsys):
    assert main(["serve", "nothing", "--host", "0.0.0.0"]) == 2
    assert "--api-key" in capsys.readouterr().err
    assert hosts_of("0.0.0.0", ["a.example"]) == ["127.0.0.1", "localhost", "::1", "[::1]", "a.example"]
    assert hosts_of("0.0.0.0", ["*"]) is None
