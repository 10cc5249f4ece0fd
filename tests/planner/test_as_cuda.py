"""Calls are rerouted to a card's kernels however they are written."""

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from onecard.planner.as_cuda import as_cuda
from onecard.planner.recorder import Recorder


def test_attention_takes_its_arguments_by_place_and_by_name() -> None:
    with FakeTensorMode(), as_cuda((8, 0)):
        rows = torch.zeros(1, 2, 16, 64, dtype=torch.bfloat16)
        by_name, by_place = Recorder(), Recorder()
        with by_name:
            F.scaled_dot_product_attention(rows, rows, rows, is_causal=True)
        with by_place:
            F.scaled_dot_product_attention(rows, rows, rows, None, 0.0, True)
    assert by_place.record.work == by_name.record.work
    assert [work.name for work in by_place.record.work] == ["_scaled_dot_product_flash_attention"]


def test_attention_of_torch_s_own_layer_is_rerouted() -> None:
    with FakeTensorMode(), as_cuda((8, 0)):
        layer = nn.MultiheadAttention(128, 2, batch_first=True, dtype=torch.bfloat16)
        rows = torch.zeros(1, 16, 128, dtype=torch.bfloat16)
        with Recorder() as recorder:
            layer(rows, rows, rows, need_weights=False)
    assert "_scaled_dot_product_flash_attention" in [work.name for work in recorder.record.work]
