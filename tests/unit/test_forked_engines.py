"""Engines are forked only from processes that survive it."""

import sys

import torch

from tests.support.vllm import forked_engines


def test_a_process_with_several_threads_spawns_its_engines(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setitem(sys.modules, "vllm", None)  # whose ways to start are changed for a fork
    with forked_engines():
        pass
