"""What the environment says about the allocator; expected tables were read out of PyTorch 2.13 itself."""

import pytest

from onecard.errors import InputError
from onecard.planner.allocator_settings import AllocatorSettings
from onecard.units import MIB


def read(text: str, platform: str = "linux") -> AllocatorSettings:
    return AllocatorSettings.from_environment({"PYTORCH_ALLOC_CONF": text}, platform)


@pytest.mark.parametrize("environ", [{}, {"PYTORCH_ALLOC_CONF": ""}, {"PATH": "/bin"}])
def test_nothing_said_is_the_default(environ: dict[str, str]) -> None:
    assert AllocatorSettings.from_environment(environ, "linux") == AllocatorSettings()


def test_every_key_that_changes_memory_is_read() -> None:
    settings = read(
        "expandable_segments:True, max_split_size_mb:128,max_non_split_rounding_mb:64,large_segment_size_mb:32,"
        "garbage_collection_threshold:0.8,roundup_power2_divisions:4,per_process_memory_fraction:0.5,backend:native,"
        "pinned_use_background_threads:True,"
    )
    assert settings == AllocatorSettings(
        expandable_segments=True,
        max_split_bytes=128 * MIB,
        max_non_split_rounding_bytes=64 * MIB,
        large_segment_bytes=32 * MIB,
        garbage_collection_threshold=0.8,
        roundup_power2_divisions=(4,) * 16,
        per_process_memory_fraction=0.5,
    )


def test_oversize_rounding_follows_the_large_segment_unless_given() -> None:
    assert read("large_segment_size_mb:40").max_non_split_rounding_bytes == 40 * MIB
    assert read("large_segment_size_mb:40,max_non_split_rounding_mb:50").max_non_split_rounding_bytes == 50 * MIB


@pytest.mark.parametrize("old", ["max_split_size_mb:64", ""])
def test_the_old_variable_wins_even_when_empty(old: str) -> None:
    environ = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:32", "PYTORCH_CUDA_ALLOC_CONF": old}
    expected = 64 * MIB if old else None
    assert AllocatorSettings.from_environment(environ, "linux").max_split_bytes == expected


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("8", [8] * 16),
        ("[256:1,512:2,>:8]", [1] * 9 + [2] + [8] * 6),
        ("[>:8]", [0] + [8] * 15),
        ("[512:4,1024:2]", [4] * 10 + [2] + [0] * 5),
        ("[256:4,1024:2,]", [4] * 9 + [0, 2] + [0] * 5),
        ("[1:2]", [2] + [0] * 15),
        ("[65536:2]", [2] * 16),
        ("[256:0,>:4]", [0] * 9 + [4] * 7),
        ("[]", [0] * 16),
    ],
)
def test_divisions_fill_the_table_as_pytorch_does(text: str, table: list[int]) -> None:
    assert list(read(f"roundup_power2_divisions:{text}").roundup_power2_divisions) == table


@pytest.mark.parametrize(
    "text",
    [
        "expandable_segments:true",
        "expandable_segments",
        "expandable_segments:True max_split_size_mb:100",
        "max_split_size_mb:19",
        "max_split_size_mb:30,large_segment_size_mb:40",
        "max_split_size_mb:-1",
        "max_split_size_mb:",
        "max_non_split_rounding_mb:10",
        "large_segment_size_mb:10",
        "garbage_collection_threshold:0",
        "garbage_collection_threshold:1.0",
        "garbage_collection_threshold:nan",
        "per_process_memory_fraction:1.1",
        "roundup_power2_divisions:0",
        "roundup_power2_divisions:3",
        "roundup_power2_divisions:[3:2]",
        "roundup_power2_divisions:[256:1;512:2]",
        "roundup_power2_divisions:[256:3]",
        "roundup_power2_divisions:[256:16",
        "backend:other",
        "nonsense:4",
        "roundup_power2_divisions=4",
    ],
)
def test_what_pytorch_refuses_is_refused_by_name(text: str) -> None:
    with pytest.raises(InputError) as caught:
        read(text)
    assert "PYTORCH_ALLOC_CONF" in str(caught.value)
    assert text.partition(":")[0].split(",")[0] in str(caught.value)


def test_all_problems_are_told_together_with_what_is_known() -> None:
    with pytest.raises(InputError) as caught:
        AllocatorSettings.from_environment({"PYTORCH_CUDA_ALLOC_CONF": "size:4,backend:x,max_split_size_mb:1"})
    message = str(caught.value)
    assert "PYTORCH_CUDA_ALLOC_CONF" in message
    assert message.count("\n  - ") == 3
    assert "expandable_segments" in message


def test_windows_has_no_expandable_segments() -> None:
    assert read("expandable_segments:True", "linux").expandable_segments
    assert not read("expandable_segments:True", "win32").expandable_segments


@pytest.mark.parametrize(
    ("text", "platform", "remarks"),
    [
        ("", "linux", []),
        ("max_split_size_mb:64,garbage_collection_threshold:0.8,backend:native", "linux", []),
        ("expandable_segments:True", "linux", []),
        ("expandable_segments:True", "win32", ["without effect on this plan: expandable_segments"]),
        ("expandable_segments:False", "win32", []),
        ("pinned_num_register_threads:4", "linux", ["without effect on this plan: pinned_num_register_threads"]),
        ("throw_on_cudamalloc_oom:True", "linux", ["at the limit nothing cached is given back first"]),
        ("throw_on_cudamalloc_oom:False", "linux", []),
        (
            "backend:cudaMallocAsync,per_process_memory_fraction:0.5,max_split_size_mb:64,expandable_segments:True",
            "linux",
            ["closed to simulation", "without effect on this plan: expandable_segments, max_split_size_mb"],
        ),
    ],
)
def test_what_is_assumed_and_what_has_no_effect_is_named(text: str, platform: str, remarks: list[str]) -> None:
    found = read(text, platform).remarks
    assert len(found) == len(remarks)
    assert all(part in remark for part, remark in zip(remarks, found, strict=True))


def test_without_the_cache_every_other_setting_has_no_effect() -> None:
    environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    settings = AllocatorSettings.from_environment(environ, "linux")
    assert settings.is_closed
    assert not settings.is_driver_pool
    assert "expandable_segments" in settings.remarks[1]
    assert not AllocatorSettings.from_environment(environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "0"}).is_closed
