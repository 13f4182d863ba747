import pytest

from memlab.meters.allocator import Settings
from memlab.units import GiB, MiB


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", Settings()),
        ("max_split_size_mb:128", Settings(max_split_size=128 * MiB)),
        (
            " expandable_segments : True, max_split_size_mb:64,",
            Settings(expandable_segments=True, max_split_size=64 * MiB),
        ),
        ("max_split_size_mb:128,max_split_size_mb:64", Settings(max_split_size=64 * MiB)),
        ("garbage_collection_threshold:0.8", Settings(garbage_collection_threshold=0.8)),
        ("roundup_power2_divisions:4", Settings(roundup_power2_divisions=4)),
        (
            "roundup_power2_divisions:[256:1,512:2,>:8],expandable_segments:False",
            Settings(roundup_power2_divisions=((256, 1), (512, 2), (">", 8))),
        ),
        (
            "large_segment_size_mb:64,max_non_split_rounding_mb:100",
            Settings(large_segment_size=64 * MiB, max_non_split_rounding=100 * MiB),
        ),
        ("backend:native,pinned_use_background_threads:True", Settings()),
    ],
)
def test_settings_are_read_as_pytorch_reads_them(text, settings):
    assert Settings.parse(text) == settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_split_size_mb", "has no value"),
        ("max_split_size_mb:", "has no value"),
        ("max_split_size_mb:1.5", "a whole number"),
        ("max_split_size_mb:-1", "a whole number"),
        ("max_split_size_mb:19", "at least 20 MiB"),
        ("max_split_size_mb:30,large_segment_size_mb:64", "at least 64 MiB"),
        ("max_non_split_rounding_mb:10", "at least 20 MiB"),
        ("large_segment_size_mb:10", "more than 10 MiB"),
        ("garbage_collection_threshold:1.0", "between 0 and 1"),
        ("garbage_collection_threshold:much", "between 0 and 1"),
        ("expandable_segments:true", "True or False"),
        ("roundup_power2_divisions:3", "power of two"),
        ("roundup_power2_divisions:[300:1]", "powers of two"),
        ("roundup_power2_divisions:[256:3]", "power of two"),
        ("roundup_power2_divisions:[>:4]", "a size before it"),
        ("roundup_power2_divisions:[256]", "one number or a list"),
        ("max_split_size:128", "Did you mean max_split_size_mb"),
        ("nonsense:3", "no setting of the allocator. There is max_split_size_mb"),
        ("backend:cudaMallocAsync", "another allocator"),
        ("per_process_memory_fraction:0.5", r"Allocator\(allowed=...\)"),
        ("throw_on_cudamalloc_oom:True", "not simulated"),
        ("max_split_size_mb:128;expandable_segments:True", "a whole number"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(text, words):
    with pytest.raises(ValueError, match=words):
        Settings.parse(text)


@pytest.mark.parametrize(
    ("asked", "size"), [(1, 512), (512, 512), (513, 1024), (MiB + 1, MiB + 512), (GiB, GiB)]
)
def test_sizes_are_rounded_to_512_bytes(asked, size):
    assert Settings().round_size(asked) == size


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        # The example of PyTorch's documentation, in KiB: 1200 lies between 1024 and 2048, and four
        # divisions are 1024, 1280, 1536 and 1792.
        (1200 * 1024, 1280 * 1024),
        (1280 * 1024, 1280 * 1024),
        (1793 * 1024, 2048 * 1024),
        (2 * MiB, 2 * MiB),
        (2 * MiB + 1, 2 * MiB + MiB // 2),
        (2048, 2048),  # not more than 4 x 512 bytes: rounded to 512 bytes
        (2049, 2560),
        (1500, 1536),
    ],
)
def test_four_divisions_between_powers_of_two(asked, size):
    assert Settings(roundup_power2_divisions=4).round_size(asked) == size


@pytest.mark.parametrize(
    ("size", "divisions"),
    # c10/test/core/AllocatorConfig_test.cpp
    [(32, 8), (64, 8), (128, 2), (256, 4), (512, 2), (1024, 4), (2048, 1), (65536, 1)],
)
def test_each_interval_has_its_divisions(size, divisions):
    pairs = ((64, 8), (128, 2), (256, 4), (512, 2), (1024, 4), (">", 1))
    settings = Settings(roundup_power2_divisions=pairs)
    step = size * MiB // divisions if divisions > 1 else 512
    assert settings.round_size(size * MiB + 1) == size * MiB + step


def test_an_interval_between_two_that_are_named_is_not_rounded():
    settings = Settings(roundup_power2_divisions=((1, 2), (4, 2)))
    assert settings.round_size(2 * MiB + 1) == 2 * MiB + 512
    assert settings.round_size(4 * MiB + 1) == 6 * MiB


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (512, 2 * MiB),
        (MiB, 2 * MiB),
        (MiB + 512, 20 * MiB),
        (10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB),
        (10 * MiB + 512, 12 * MiB),
        (33 * MiB, 34 * MiB),
    ],
)
def test_segments_are_of_few_sizes(size, segment):
    assert Settings().segment_size(size) == segment


def test_the_large_segments_can_be_larger():
    settings = Settings(large_segment_size=64 * MiB)
    assert settings.segment_size(2 * MiB) == 64 * MiB
    assert settings.segment_size(12 * MiB) == 12 * MiB
