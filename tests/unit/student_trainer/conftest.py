"""A small tokenizer and model, made anew for each test."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support.models import save_tokenizer


@pytest.fixture(scope="session")
def _tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(_tokenizer_folder):
    return AutoTokenizer.from_pretrained(_tokenizer_folder)
