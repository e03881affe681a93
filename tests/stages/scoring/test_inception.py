"""Inception, with random weights: its features and their distances are torch-fidelity's; what else a file may be."""

import io
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from stages.scoring import inception
from stages.scoring.distribution import Moments, frechet_distance, inception_score, kernel_distance

N = 6


class Random(FeatureExtractorInceptionV3):
    """The architecture, and whatever weights it starts from."""

    def load_state_dict(self, state: object) -> None:
        """Nothing is loaded."""


def random_weights(path: Path) -> Path:
    """A file of the right architecture, in torch's format."""
    torch.manual_seed(0)
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Random("random", ["64"], feature_extractor_weights_path=nothing)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # or nothing would be left of a picture after forty layers
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("inception") / "inception.pth")


class Pictures(Dataset):
    """Noise, of a seed."""

    def __init__(self, seed: int) -> None:
        self.values = np.random.default_rng(seed).integers(0, 256, (N, 48, 48, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return N

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self.values[number]).permute(2, 0, 1)


def test_features_and_all_three_distances_are_torch_fidelitys(weights: Path) -> None:
    """By a layer of 64 features, of which the moments are quick."""
    ours, real = Pictures(0), Pictures(1)
    theirs = calculate_metrics(
        input1=ours, input2=real, fid=True, kid=True, isc=True, cuda=False, verbose=False, save_cpu_ram=True,
        feature_extractor_weights_path=str(weights), feature_layer_fid="64", feature_layer_kid="64",
        kid_subsets=5, kid_subset_size=3, isc_splits=2, batch_size=N, cache=False, num_workers=0,
    )  # fmt: skip
    extractor = inception.load(weights, features="64")
    (features, logits), (others, _) = (extractor(list(side.values)) for side in (ours, real))
    assert (features.shape, logits.shape) == ((N, 64), (N, 1008))
    found = frechet_distance(Moments.of(features), Moments.of(others))
    assert found == pytest.approx(theirs["frechet_inception_distance"], abs=1e-8)
    kid = kernel_distance(features, others, subsets=5, size=3)
    # Theirs is computed in fp32 here, of numbers near 1; of features in fp64 both agree to 1e-8 (test_distribution).
    assert kid.mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert kid.std == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-6)
    score = inception_score(logits, splits=2)
    assert score.mean == pytest.approx(theirs["inception_score_mean"], abs=1e-8)


def test_a_file_of_another_architecture_is_refused_in_a_sentence(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    torchvisions = {name.replace("Mixed", "AuxLogits"): value for name, value in state.items()}
    files = {"other.pth": torchvisions, "wider.pth": state | {"fc.weight": torch.zeros(1000, 2048)}}
    for name, tensors in files.items():
        torch.save(tensors, tmp_path / name)
        with pytest.raises(inception.BadInception, match=rf"^\S+{name} does not hold the tensors of Inception v3"):
            inception.load(tmp_path / name)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(inception.BadInception, match=r"text\.pth"):
        inception.load(tmp_path / "text.pth")


def test_tensors_may_lie_in_safetensors_too_and_nothing_in_a_file_is_executed(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    safetensors.torch.save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "i.safetensors")
    picture = [Pictures(0).values[0]]
    once, again = (inception.load(path)(picture)[0] for path in (weights, tmp_path / "i.safetensors"))
    assert np.array_equal(once, again)
    assert once.shape == (1, 2048)

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "executed",)  # type: ignore[return-value]

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(inception.BadInception):
        inception.load(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_without_torch_fidelity_it_says_what_to_install(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(inception.BadInception, match=r"torch-fidelity 0\.4; install it: pip install torch-fidelity"):
        inception.load(weights)
