import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkkv_cluster.bench.trace import TokenSource, generate_tokens


def splitmix64_of_the_page(seed: int, k: int) -> int:
    mask = 2**64 - 1
    z = (((seed << 32) + k) + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_seed_1_of_vocabulary_8192_gives_the_tokens_that_the_format_names():
    assert generate_tokens(1, 3, 8192).tolist() == [6072, 2163, 1382]


@given(seed=st.integers(0, 2**32 - 1), num_tokens=st.integers(0, 40), vocab_size=st.integers(6, 2**31 - 1))
def test_tokens_equal_splitmix64_in_unbounded_integers(seed: int, num_tokens: int, vocab_size: int):
    expected = [5 + splitmix64_of_the_page(seed, k) % (vocab_size - 5) for k in range(num_tokens)]
    tokens = generate_tokens(seed, num_tokens, vocab_size)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == expected


@pytest.mark.parametrize("source", [TokenSource(tokens=(7, 8, 9)), TokenSource(num_tokens=3, seed=4)])
def test_a_source_knows_its_length_without_making_its_tokens(source: TokenSource):
    assert len(source) == 3 == len(source.array(100))
