"""Networks of several rewards are loaded one after the other, and each once."""

import threading
import time

import pytest
import torch

from rewards.loading import loaded_once
from rewards.networks.weights import from_pretrained


def at_once(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def test_what_one_load_changes_for_all_threads_reaches_no_other_load():
    seen = []

    @loaded_once
    def in_half_precision(name):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        time.sleep(0.2)
        torch.set_default_dtype(before)

    @loaded_once
    def plain(name):
        seen.append(torch.zeros(1).dtype)

    at_once(
        lambda: in_half_precision("a"),
        lambda: (time.sleep(0.05), plain("b")),
        lambda: (time.sleep(0.1), plain("c")),
    )
    assert seen == [torch.float32] * 2


def test_equal_arguments_load_once_and_what_is_loaded_waits_for_nobody():
    loads, begun, got, in_time = [], threading.Event(), threading.Event(), []

    @loaded_once
    def slow(name, device="cpu"):
        loads.append((name, device))
        if name == "b":
            begun.set()
            in_time.append(got.wait(10))
        time.sleep(0.1)
        return object()

    at_once(lambda: slow("a"), lambda: slow("a"), lambda: slow("a", device="cuda"))
    assert sorted(loads) == [("a", "cpu"), ("a", "cuda")]
    at_once(lambda: slow("b"), lambda: (begun.wait(10), slow("a"), got.set()))
    assert in_time == [True]  # "a" was got in the middle of loading "b"


def test_a_failed_load_is_tried_again_and_one_network_may_be_part_of_another():
    attempts = []

    @loaded_once
    def part():
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("disk")
        return "part"

    @loaded_once
    def whole():
        return f"whole with {part()}"

    with pytest.raises(OSError, match="disk"):
        whole()
    assert whole() == "whole with part"


def test_weights_in_half_precision_load_as_float32_without_changing_the_default(
    tmp_path, monkeypatch
):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).half().save_pretrained(tmp_path)
    defaults, make = [], Dinov2Model.__init__

    def watched(self, config, *args, **kwargs):
        defaults.append(torch.get_default_dtype())
        make(self, config, *args, **kwargs)

    monkeypatch.setattr(Dinov2Model, "__init__", watched)
    network = from_pretrained(Dinov2Model, str(tmp_path), None, "dino")
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert defaults == [torch.float32]
