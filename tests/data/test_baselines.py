import json
import math

import numpy as np
import pytest

from deltamoe.data import PreparedData, baselines, measure_baselines, prepare
from deltamoe.data.baselines import ngram_bits_per_byte, xz_bits_per_byte
from deltamoe.errors import DataError
from deltamoe.tokenizer import ByteTokenizer


def slow_ngram_bits_per_byte(validation, train, order):
    """The definition, byte by byte, in dictionaries."""
    counts = {}
    for n in range(1, order + 1):
        for end in range(n, len(train) + 1):
            followers = counts.setdefault(train[end - n : end - 1], {})
            followers[train[end - 1]] = followers.get(train[end - 1], 0) + 1
    bits = 0.0
    for i, byte in enumerate(validation):
        p = 1 / 256
        for n in range(1, min(order, i + 1) + 1):
            followers = counts.get(validation[i - n + 1 : i], {})
            if followers:
                kinds, total = len(followers), sum(followers.values())
                p = (followers.get(byte, 0) + kinds * p) / (total + kinds)
        bits -= math.log2(p)
    return bits / len(validation)


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_the_ngram_is_its_definition(order):
    bytes_of = np.random.Generator(np.random.PCG64(order))
    train = bytes(bytes_of.integers(97, 101, 300).tolist())
    validation = bytes(bytes_of.integers(97, 102, 100).tolist())
    fast = ngram_bits_per_byte(validation, train, order)
    # sums of 100 logarithms in float64
    assert fast == pytest.approx(slow_ngram_bits_per_byte(validation, train, order), rel=1e-12)


def test_probabilities_sum_to_one():
    train, context = b"the cat sat on the mat" * 3, b"the "
    losses = [
        5 * ngram_bits_per_byte(context + bytes([byte]), train)
        - 4 * ngram_bits_per_byte(context, train)
        for byte in range(256)
    ]
    assert sum(2**-loss for loss in losses) == pytest.approx(1.0, abs=1e-9)  # 256 float64 terms


def test_texts_shorter_than_the_order():
    assert ngram_bits_per_byte(b"a", b"a") == pytest.approx(-math.log2((1 + 1 / 256) / 2))
    assert ngram_bits_per_byte(b"abc", b"") == 8.0
    with pytest.raises(ValueError, match="order 9"):
        ngram_bits_per_byte(b"a", b"a", 9)


def test_xz_finds_in_the_training_text_what_it_is_given():
    noise = np.random.Generator(np.random.PCG64(0)).bytes(20_000)
    assert xz_bits_per_byte(noise) > 8.0  # no byte can be saved, and the container costs some
    assert xz_bits_per_byte(noise, noise + noise[:1000]) < 0.1
    assert xz_bits_per_byte(noise[:10_000], noise[10_000:]) > 7.9


def test_they_are_measured_once(config):
    data = prepare(config)
    (source,) = data.sources
    told = []
    first = measure_baselines(data.tokenizer, source, told.append)
    assert len(told) == 2
    assert first.train_bytes == data.train.num_bytes
    assert first.validation_bytes == data.validation.num_bytes
    assert 0 < first.xz_given_train < first.xz
    assert 0 < first.ngram < 2
    assert measure_baselines(data.tokenizer, source, told.append) == first
    assert len(told) == 2
    assert source.folder is not None
    path = source.folder / "baselines.json"
    path.write_text(json.dumps({"format": 1, "xz": 1.0}))
    with pytest.raises(DataError, match="remove the file"):
        measure_baselines(data.tokenizer, source)


def test_they_do_not_depend_on_the_tokenizer_and_read_a_bounded_text(config, monkeypatch):
    monkeypatch.setattr(baselines, "MAX_TRAIN_BYTES", 500)
    texts = ["words and words " * 20, "words in the same manner " * 20]
    data = PreparedData.in_memory(texts, ["words held out " * 9])
    assert isinstance(data.tokenizer, ByteTokenizer)
    measured = measure_baselines(data.tokenizer, data.sources[0])
    assert measured.train_bytes == 500
    assert measured.ngram == ngram_bits_per_byte(
        b"words held out " * 9, "".join(texts).encode()[:500]
    )
