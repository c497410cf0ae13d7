"""Autocast only where the device computes in the type; a processor that would only convert is told once."""

import logging

import pytest
import torch
from tsfm.network import cpu as precision

pytestmark = pytest.mark.convolutions

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch):
    """Pretend a processor with these capabilities."""

    def pretend(**capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        precision.computes_in.cache_clear()

    yield pretend
    precision.computes_in.cache_clear()


def product_dtype(**options):
    with precision.autocast(CPU, **options):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_processor_with_bfloat16_computes_in_it(processor, name):
    processor(**{name: True})
    assert product_dtype() == torch.bfloat16
    assert product_dtype(amp=False) == torch.float32


def test_one_without_computes_in_float32_and_says_so_once(processor, caplog):
    processor(avx2=True, avx512_bf16=False)
    with caplog.at_level(logging.WARNING):
        assert product_dtype() == product_dtype() == torch.float32
    assert [record.message for record in caplog.records] == [
        "this processor has no bfloat16 arithmetic: computing in float32"
    ]


def test_float16_is_looked_up_apart(processor):
    processor(avx512_bf16=True)
    assert product_dtype(dtype=torch.float16) == torch.float32


def test_a_gpu_that_only_emulates_bfloat16_is_told_of_float16(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    precision.computes_in.cache_clear()
    assert not precision.computes_in("cuda", torch.bfloat16) and precision.computes_in("cuda", torch.float16)
    assert "--amp_dtype float16" in caplog.text
    precision.computes_in.cache_clear()
