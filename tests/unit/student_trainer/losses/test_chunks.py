"""The size of a chunk of positions, by device, vocabulary and what is trained."""

import pytest
import torch

from student_trainer.losses.chunks import card_bytes, chunk_bytes, chunk_positions

H200, SMALL = 141 * 10**9, 24 * 10**9


@pytest.mark.parametrize(
    ("count", "size"), [(1024, 342), (512, 256), (441, 441), (442, 221), (1, 1), (0, 1)]
)
def test_on_a_cpu_chunks_are_equal_and_of_256_mib_at_most(count, size):
    assert chunk_positions(count, 151_936, None, trained=True) == size
    assert chunk_positions(count, 151_936, None, trained=False) == size


@pytest.mark.parametrize(
    ("vocab_size", "card", "trained", "limit"),
    [
        (151_936, H200, True, 3533), (151_936, H200, False, 883), (151_936, SMALL, True, 1645),
        (32_000, H200, True, 4096), (32_000, SMALL, True, 4096), (32_000, SMALL, False, 4096),
        (256_000, H200, True, 2097), (256_000, SMALL, True, 976),
    ],
)  # fmt: skip
def test_a_gpu_takes_as_many_positions_as_its_matmuls_need(vocab_size, card, trained, limit):
    assert chunk_positions(limit, vocab_size, card, trained=trained) == limit
    assert chunk_positions(limit + 1, vocab_size, card, trained=trained) == limit // 2 + 1


@pytest.mark.parametrize("card", [4 * 10**9, SMALL, 80 * 10**9, H200, 10**12])
@pytest.mark.parametrize("trained", [False, True])
def test_a_chunk_and_its_half_precision_take_a_sixteenth_of_a_card_at_most(card, trained):
    found = chunk_bytes(card, trained=trained)
    assert found <= (2 << 30 if trained else 512 << 20)
    assert 1.5 * found <= max(card / 16, 1.5 * (256 << 20))


def test_even_a_row_that_is_over_the_limit_is_a_chunk():
    assert chunk_positions(3, 10**9, None, trained=True) == 1
    assert chunk_positions(3, 10**9, H200, trained=True) == 1


def test_a_cpu_is_no_card():
    assert card_bytes(torch.device("cpu")) is None
