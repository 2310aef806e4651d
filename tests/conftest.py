"""What every test shares: one torch thread, offline, the switch for slow tests, and a ten-second lab."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from locedit.lab import Lab


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run tests that train or use a lab model")


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--runslow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --runslow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _helpers_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What helper models say and label is not kept in the user's cache; a test with its own LOCEDIT_CACHE uses that."""
    from locedit.unlearn import helpers

    cache_folder = helpers.cache_folder
    users, instead = cache_folder(), tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "cache_folder", lambda: instead if cache_folder() == users else cache_folder())
        yield


@pytest.fixture(scope="session")
def tiny_lab(tmp_path_factory: pytest.TempPathFactory) -> "Lab":
    """A small world and a two-layer GPT-2 that has learned it, trained once in about ten seconds."""
    from locedit.lab import lab

    return lab("facts", size="tiny", cache=tmp_path_factory.mktemp("labs"))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the helper models that are trained."""
    from locedit.unlearn import helpers

    names: list[str] = []
    train = helpers.train

    def counted(model: Any, objective: Any, **more: Any) -> Any:
        names.append(objective.name)
        return train(model, objective, **more)

    monkeypatch.setattr(helpers, "train", counted)
    return names
