from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from memopt.errors import InputRefused
from memopt_models import downloads


@pytest.fixture
def mnist_root(small_mnist: Path) -> Path:
    """The real data where there are any, files of the same form where not."""
    real = Path(os.environ.get("MEMOPT_DATA_ROOT", "nowhere"))
    return real if (real / "MNIST" / "raw").is_dir() else small_mnist


def test_mnist_holds_out_a_twelfth_and_stays_mapped(mnist_root: Path) -> None:
    data = downloads.mnist(mnist_root, download=False)
    assert len(data.train) == 11 * len(data.validation)
    assert data.classes == tuple("0123456789")
    for split in data.splits.values():
        assert isinstance(split.images, np.memmap)
        assert not split.images.flags.owndata
    data.input_spec.check(np.zeros((2, 1, 28, 28), np.float32))


def test_mnist_is_normalized_by_its_train_pictures(mnist_root: Path) -> None:
    data = downloads.mnist(mnist_root, download=False)
    normalize = data.preprocess[3]
    assert normalize["mean"] == pytest.approx([data.train.images.mean() / 255], abs=6e-5)
    assert normalize["std"] == pytest.approx([data.train.images.std() / 255], abs=6e-5)


def test_train_and_validation_share_no_picture(small_mnist: Path) -> None:
    data = downloads.mnist(small_mnist, download=False)
    together = np.concatenate([data.train.images, data.validation.images]).reshape(-1, 28 * 28)
    assert len(np.unique(together, axis=0)) == 120


def test_fashion_mnist_lies_beside_mnist(small_mnist: Path) -> None:
    (small_mnist / "MNIST").rename(small_mnist / "FashionMNIST")
    data = downloads.fashion_mnist(small_mnist, download=False)
    assert (data.name, data.classes[9]) == ("fashion-mnist", "ankle boot")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_missing_data_is_refused_with_a_hint(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputRefused) as raised:
        getattr(downloads, name)(tmp_path, download=False)
    shown = name.replace("_", "-")
    assert str(raised.value) == f"{shown} is not in {tmp_path}; hint: --data-root DIR, or MEMOPT_DATA_ROOT"


def test_failed_download_is_refused_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def offline(root: Path, *, train: bool, download: bool) -> None:
        raise RuntimeError("Error downloading train-images\nTried a mirror")

    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    with pytest.raises(InputRefused) as raised:
        downloads.mnist(tmp_path, download=True)
    assert f"mnist is not in {tmp_path}, and the download failed: Error downloading train-images; hint: " in str(
        raised.value
    )


def test_missing_data_is_fetched_when_allowed(small_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    raw = small_mnist / "MNIST" / "raw"
    away = raw.rename(small_mnist / "elsewhere")
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda root, train, download: away.rename(raw))
    assert len(downloads.mnist(small_mnist, download=True).test) == 24


def test_cifar10_comes_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def fake(root: Path, *, train: bool, download: bool) -> SimpleNamespace:
        n = 48 if train else 10
        return SimpleNamespace(data=np.zeros((n, 32, 32, 3), np.uint8), targets=[i % 10 for i in range(n)])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    data = downloads.cifar10(tmp_path, download=True)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 44, "validation": 4, "test": 10}
    assert data.input_spec.shape == ("batch", 3, 32, 32)


def test_cifar10_is_unpickled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("MEMOPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"a pickle")
    opened: list[bool] = []

    def fake(root: Path, *, train: bool, download: bool) -> SimpleNamespace:
        opened.append(train)
        n = 48 if train else 10
        images = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), np.uint8)
        return SimpleNamespace(data=images, targets=[i % 10 for i in range(n)])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    first, again = (downloads.cifar10(tmp_path, download=False) for _ in range(2))
    assert opened == [True, False]
    assert first.fingerprint == again.fingerprint
    assert not again.train.images.flags.owndata
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"others")
    downloads.cifar10(tmp_path, download=False)
    assert opened == [True, False] * 2
