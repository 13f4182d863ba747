"""Lives: every hand-out is paired with its return."""

from memlab.ledger import Block, Event, format_type, lives


def test_every_hand_out_is_paired_with_its_return():
    blocks = lives(
        [
            Event(10, 1, 100),
            Event(20, 2, 50),
            Event(30, 1, -100),
            Event(40, 1, 70),
            Event(50, 2, -50),
        ]
    )
    assert [(b.address, b.bytes, b.born, b.died) for b in blocks] == [
        (1, 100, 10, 30),
        (2, 50, 20, 50),
        (1, 70, 40, None),
    ]


def test_an_address_handed_out_again_ends_the_block_that_lived_there():
    """Another thread gave it back, which the profiler does not report."""
    blocks = lives([Event(10, 1, 100), Event(20, 1, 60)])
    assert [(b.bytes, b.died) for b in blocks] == [(100, 20), (60, None)]


def test_a_block_reads_as_a_line():
    block = Block(2**20, 7, 0, None, "activations", "forward", "blocks.0", "aten::gelu")
    words = ["1.00", "MiB", "activations", "type", "not", "seen", "aten::gelu", "blocks.0"]
    assert str(block).split() == words
    block.dtype = "float32"
    block.shape = (512, 512)
    assert "  activations     FP32 (512, 512)  " in str(block)


def test_a_type_reads_as_the_field_writes_it():
    assert format_type("bfloat16", (64, 8000)) == "BF16 (64, 8000)"
    assert format_type("int64", ()) == "int64 ()"
    assert format_type("float16") == "FP16"
    assert format_type(None, (3,)) == "type not seen"
