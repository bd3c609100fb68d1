"""FID's Inception: every tap is torch-fidelity's, as record_inception.py prints it, to 1e-5 of the tap's norm."""

import pytest
import torch

from latentsmith.evaluation.extractors import open_extractor
from latentsmith.evaluation.resize import legacy_tensorflow
from latentsmith.evaluation.weights import fill
from latentsmith.files.errors import BadInput
from latentsmith.models.inception import TAPS, FidInception

from .record_inception import image, summary, weights

RECORDED = {  # torch-fidelity 0.4.0, torch 2.13.0 on a CPU
    "64": [5.251696114503165, 0.7425808310508728, -6.526508763270978],
    "192": [10.289419479091244, 0.0, -17.12428090293743],
    "768": [17.545296205315744, 0.0, -28.322683693760318],
    "2048": [25.566652369378012, 0.8533849716186523, -15.958425476978807],
    "logits_unbiased": [24.44150083712452, 0.36598628759384155, -47.52241640203322],
    "logits": [24.708835446256735, 0.4930976927280426, -55.68224604317338],
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(weights(), path, _use_new_zipfile_serialization=False)  # as the published file is
    return path


def test_every_tap_is_torch_fidelitys():
    network = FidInception()
    fill(network, weights(), "weights")
    taps = network((legacy_tensorflow(image().float(), 299) - 128) / 128)
    for name in TAPS:
        scale = RECORDED[name][0]
        assert summary(taps[name]) == pytest.approx(RECORDED[name], rel=0, abs=1e-5 * scale), name


def test_the_extractor_reads_the_published_file(file, monkeypatch):
    named = open_extractor(f"inception:{file}", resize="legacy-tensorflow")
    monkeypatch.setenv("LATENTSMITH_INCEPTION", str(file))
    found = open_extractor("inception")
    assert (named.name, named.side, named.resize, found.resize) == ("inception", 299, "legacy-tensorflow", "clean")
    assert named.fingerprint == found.fingerprint
    with torch.inference_mode():
        made = named.network(legacy_tensorflow(image().float(), 299))
    for name, tap in (("features", "2048"), ("logits", "logits_unbiased")):
        assert summary(made[name]) == pytest.approx(RECORDED[tap], rel=0, abs=1e-5 * RECORDED[tap][0])


def test_other_weights_are_one_line(file, tmp_path, monkeypatch):
    held = weights()
    for change, message in (
        (lambda state: state.pop("fc.weight"), "1 tensors are missing, such as fc.weight"),
        (lambda state: state.update(more=torch.zeros(1)), "1 tensors are not the network's, such as more"),
        (lambda state: state.update({"fc.bias": torch.zeros(1000)}), "of another shape, such as fc.bias"),
    ):
        state = dict(held)
        change(state)
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(BadInput, match=message):
            open_extractor(f"inception:{tmp_path / 'w.pth'}")
    (tmp_path / "cut.pth").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadInput, match="is damaged, or holds more than tensors"):
        open_extractor(f"inception:{tmp_path / 'cut.pth'}")
    monkeypatch.setenv("LATENTSMITH_INCEPTION", str(tmp_path / "none.pth"))
    with pytest.raises(BadInput, match="inception: no weights at"):
        open_extractor("inception")
