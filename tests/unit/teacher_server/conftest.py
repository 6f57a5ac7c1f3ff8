"""One tiny model, on disk and loaded, for the tests of this folder."""

import pytest

from tests.support.models import save_model, save_tokenizer
from tests.support.reference import load_model


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_tokenizer(folder)
    save_model(folder, max_position_embeddings=64)
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder):
    return load_model(llama_folder)
