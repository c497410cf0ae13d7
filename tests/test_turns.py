"""What the first of several processes does for all, and how the others wait for it."""

import logging
import threading
import time

import pytest
import torch
from tsfm.planning import turns


@pytest.fixture
def processes(monkeypatch):
    """``processes(block)`` runs ``block(rank)`` as two processes that share a store; returns what each raised, by rank."""
    store, place = torch.distributed.HashStore(), threading.local()
    monkeypatch.setattr(turns.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(turns.dist, "get_rank", lambda: place.rank)
    monkeypatch.setattr(turns.dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(turns, "_TURNS", iter([0, 0]))  # in two processes both count from 0

    def run(block):
        raised = {}

        def process(rank):
            place.rank = rank
            try:
                block(rank)
            except Exception as error:
                raised[rank] = error

        threads = [threading.Thread(target=process, args=(rank,)) for rank in (1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return raised

    return run


def test_the_others_come_after_the_first_and_say_what_they_wait_for(processes, caplog):
    caplog.set_level(logging.INFO)
    order = []

    def block(rank):
        with turns.first_process_first("measures the data"):
            time.sleep(2 if rank == 0 else 0)
            order.append(rank)

    assert not processes(block) and order == [0, 1]
    assert "process 1 waits while the first process measures the data (0 min so far)" in caplog.text


def test_an_error_of_the_first_ends_the_others_waiting(processes):
    def block(rank):
        with turns.first_process_first("measures the data"):
            if rank == 0:
                raise ValueError("a damaged case")
            pytest.fail("the others must not go on")

    raised = processes(block)
    assert isinstance(raised[0], ValueError) and isinstance(raised[1], turns.FirstFailed)
    assert "which measures the data for all" in str(raised[1])


def test_one_process_alone_does_not_wait():
    with turns.first_process_first():
        pass
