"""The chunked loss is the plain one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from onecard.model import loss as loss_module
from onecard.model.loss import IGNORE, Head, sum_loss, token_losses
from onecard.planner.recorder import Recorder

N, D, V = 200, 16, 50


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(V, (N,), generator=generator)
    targets[::3] = IGNORE
    hidden, weight, bias = (tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias))
    return hidden, weight, bias, targets


def plain_loss(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, head.weight_VD, head.bias_V).float() * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


@pytest.fixture(params=[64, 100, N, 10 * N], ids=lambda rows: f"{rows} rows")
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", {"cpu": 4 * V * request.param, "cuda": 1})
    return int(request.param)


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 3.0)])
def test_loss_and_gradients_equal_plain_cross_entropy(
    chunk_rows: int, scale: float, softcap: float | None, has_bias: bool
) -> None:
    hidden, weight, bias, targets = inputs()
    head = Head(weight, bias if has_bias else None, scale, softcap)
    wanted = [hidden, weight, *([bias] if has_bias else [])]
    expected = plain_loss(hidden, head, targets)
    expected_gradients = torch.autograd.grad(expected * 0.37, wanted)
    found = sum_loss(hidden, head, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for gradient, other in zip(torch.autograd.grad(found * 0.37, wanted), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_chunks_have_the_size_of_the_budget(chunk_rows: int) -> None:
    sizes = [rows.stop - rows.start for rows in loss_module._chunks(N, Head(torch.empty(V, D), None))]
    assert sum(sizes) == N
    assert max(sizes) == min(N, chunk_rows)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_any_chunk_size_gives_the_loss_and_gradients_of_all_logits_at_once(scale: float, softcap: float | None) -> None:
    hidden, weight, bias, targets = inputs()
    sizes, found = ("full", 1, 7, N, 10 * N, None), []
    for size in sizes:
        head = Head(weight, bias, scale, softcap, chunk_size=size)
        loss = sum_loss(hidden, head, targets)
        found.append([loss, *torch.autograd.grad(loss, (hidden, weight, bias)), token_losses(hidden, head, targets)])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_logits_at_once_take_the_memory_of_all_logits(dtype: torch.dtype) -> None:
    words, rows, chunk = 4096, 256, 32
    weight = torch.zeros(words, D, dtype=dtype, requires_grad=True)
    hidden, targets = torch.zeros(rows, D, dtype=dtype, requires_grad=True), torch.zeros(rows, dtype=torch.long)
    peaks = {
        size: peak_bytes(lambda size=size: sum_loss(hidden, Head(weight, None, chunk_size=size), targets))
        for size in ("full", chunk)
    }
    # 16-bit logits beside their fp32 copy, whose memory the gradient takes over; in fp32 there is no copy.
    bytes_per_logit = 6 if dtype == torch.bfloat16 else 4
    assert peaks["full"] - peaks[chunk] == pytest.approx(bytes_per_logit * (rows - chunk) * words, rel=0.01)


def test_bf16_is_as_exact_as_its_input(chunk_rows: int) -> None:
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    copies = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = plain_loss(copies[0], Head(copies[1], copies[2]), targets)
    found = sum_loss(hidden, Head(weight, bias), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)
    pairs = zip(torch.autograd.grad(found, (hidden, weight, bias)), torch.autograd.grad(expected, copies), strict=True)
    for gradient, other in pairs:
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - other).norm() < 0.01 * other.norm()


def test_many_chunks_in_bf16_add_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    # 600 equal chunks: a sum in bf16 stands still once it is 256 times the summand.
    monkeypatch.setattr(loss_module, "_chunks", lambda count, head: [slice(i, i + 1) for i in range(count)])
    hidden = torch.ones(600, 4, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((2, 4), (2,)))
    loss = sum_loss(hidden, Head(weight, bias), torch.zeros(600, dtype=torch.long))
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert gradients[0].tolist() == [[-300.0] * 4, [300.0] * 4]
    assert gradients[1].tolist() == [-300.0, 300.0]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_without_targets_loss_and_gradients_are_zero(softcap: float | None) -> None:
    hidden, weight, bias, targets = inputs()
    found = sum_loss(hidden, Head(weight, bias, softcap=softcap), torch.full_like(targets, IGNORE))
    assert found.item() == 0.0
    for gradient in torch.autograd.grad(found, (hidden, weight, bias)):
        assert not gradient.any()


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, _, targets = inputs()
    loss = sum_loss(hidden * 1e4, Head(weight, None), targets)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, plain_loss(hidden * 1e4, Head(weight, None), targets))


def test_token_losses_are_those_of_each_token(chunk_rows: int) -> None:
    hidden, weight, bias, targets = inputs()
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    found = token_losses(hidden, Head(weight, bias), targets)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(sum_loss(hidden, Head(weight, bias), targets), expected.sum())


def test_a_frozen_head_gets_no_gradient_but_passes_it_on() -> None:
    hidden, weight, bias, targets = inputs()
    frozen = Head(weight.detach(), bias.detach())
    sum_loss(hidden, frozen, targets).backward()
    assert hidden.grad is not None
    expected = torch.autograd.grad(plain_loss(hidden, frozen, targets), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_head_is_added_to_a_tensor_of_the_caller(chunk_rows: int, dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = inputs(dtype)
    expected = torch.autograd.grad(sum_loss(hidden, Head(weight, bias), targets), (hidden, weight, bias))
    gradient = torch.ones(V, D)
    found = sum_loss(hidden, Head(weight, bias), targets, None, gradient)
    found.backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(bias.grad, expected[2], rtol=0, atol=0)
    # Before it was rounded, so closer than its type to what autograd gives.
    torch.testing.assert_close(
        (gradient - 1).to(dtype), expected[1], rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-5
    )


@pytest.mark.parametrize(
    ("model_type", "setting"), [("granite", {"logits_scaling": 4.0}), ("cohere", {"logit_scale": 0.25})]
)
def test_scaled_heads_are_known(
    model_type: str, setting: dict[str, float], settings_of: Callable[..., dict[str, object]]
) -> None:
    from onecard.model.build import build_model
    from onecard.model.checks import check_head
    from onecard.model.loss import find_head

    settings = settings_of("llama", model_type=model_type, **setting)
    model = build_model(settings, dropout=0.0, init="transformers", seed=0)
    assert find_head(model).scale == 0.25
    check_head(model)


def test_a_head_that_does_something_else_is_refused(settings_of: Callable[..., dict[str, object]]) -> None:
    from onecard.errors import InputError
    from onecard.model.build import build_model
    from onecard.model.checks import check_head

    model = build_model(settings_of("llama"), dropout=0.0, init="transformers", seed=0)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(InputError, match="llama changes its logits"):
        check_head(model)


def test_the_factor_is_applied_before_gradients_are_rounded() -> None:
    # A word of probability 3e-8 has a gradient below fp16's smallest number unless it is scaled first.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, D, generator=generator).half().requires_grad_()
    weight = torch.zeros(V, D, dtype=torch.float16, requires_grad=True)
    bias = torch.zeros(V, dtype=torch.float16)
    bias[0] = 17.0
    bias.requires_grad_()
    targets = torch.zeros(64, dtype=torch.long)
    factor = torch.tensor(2.0**15)
    expected = torch.autograd.grad(
        plain_loss(hidden.float(), Head(weight.float(), bias.float()), targets) * factor, (bias,)
    )[0]
    (found,) = torch.autograd.grad(sum_loss(hidden, Head(weight, bias), targets, factor), (bias,))
    assert found[1:].min() > 0
    torch.testing.assert_close(found[1:].float(), expected[1:].float(), rtol=2e-2, atol=0)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that storages made by `run` take together."""
    with Recorder() as recorder:
        run()
    sizes, live, most = recorder.record.sizes, 0, 0
    for number in recorder.record.order:
        live += sizes[number] if number >= 0 else -sizes[~number]
        most = max(most, live)
    return most


def test_many_chunks_take_no_more_memory_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width, words = 64, 16, 1000
    chunk_bytes = 4 * words * rows
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", {"cpu": chunk_bytes, "cuda": 1})
    weight = torch.zeros(words, width)
    trained = weight.clone().requires_grad_()

    def growth(compute: Callable[[torch.Tensor, torch.Tensor], object]) -> int:
        sizes = []
        for num_chunks in (1, 8):
            hidden, targets = torch.zeros(num_chunks * rows, width), torch.zeros(num_chunks * rows, dtype=torch.long)
            sizes.append(peak_bytes(lambda hidden=hidden, targets=targets: compute(hidden, targets)))
        return sizes[1] - sizes[0]

    # Inputs and results grow with the tokens, by a quarter of a chunk.
    assert growth(lambda hidden, targets: token_losses(hidden, Head(weight, None), targets)) < chunk_bytes // 2
    head = Head(trained, None)
    assert growth(lambda hidden, targets: sum_loss(hidden.requires_grad_(), head, targets)) < chunk_bytes // 2


def test_the_backward_pass_makes_no_second_copy_of_the_gradients() -> None:
    hidden, weight, bias, targets = inputs()
    loss = sum_loss(hidden, Head(weight, bias), targets)
    saved = {tensor.data_ptr() for tensor in loss.grad_fn.saved_tensors if tensor is not None}  # type: ignore[union-attr]
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    assert {gradient.data_ptr() for gradient in gradients} == saved
