"""Over how many devices a server can split a quantized model."""

from hf_awq_offload.formats.tensor_parallel import DEGREES, Shape, advice, allows, parallel_degrees

HIDDEN = 8192
"""Hidden size of a model of 72 billion parameters, whose MLP is 29568 wide."""


def mlp(width: int, group_size: int, hidden: int = HIDDEN) -> list[Shape]:
    return [
        Shape("layers.0.mlp.up_proj", hidden, width, group_size),
        Shape("layers.0.mlp.down_proj", width, hidden, group_size),
    ]


def test_an_odd_number_of_groups_can_not_be_shared():
    linears = mlp(29568, 128)
    assert 29568 // 128 == 231
    assert parallel_degrees(linears, 8) == ()
    assert advice(linears, 8) == (
        "Tensor parallelism: servers can't split this model over 2, 4 or 8, since layers.0.mlp.down_proj has 231 "
        "groups of 128 input channels. With group_size=32 they could split it over 2 or 4."
    )
    assert parallel_degrees(mlp(29568, 64), 8) == (2,)
    assert parallel_degrees(mlp(29568, 32), 8) == (2, 4)


def test_nothing_is_said_where_all_degrees_are_possible():
    assert parallel_degrees(mlp(28672, 128), 8) == DEGREES
    assert advice(mlp(28672, 128), 8) is None
    assert advice([], 8) is None


def test_the_larger_of_two_group_sizes_that_do_the_same_is_proposed():
    text = advice(mlp(128 * 12, 128), 8)  # 12 groups, 24 of 64, 48 of 32
    assert "over 2 or 4 devices, not over 8, since layers.0.mlp.down_proj has 12 groups of 128" in text
    assert text.endswith("With group_size=64 they could split it over 2, 4 or 8.")


def test_output_channels_are_split_too_in_whole_words():
    narrow = Shape("layers.0.self_attn.k_proj", HIDDEN, 32, 128)
    assert [degree for degree in DEGREES if allows(narrow, degree, 8)] == [2, 4]
    assert allows(narrow, 8, per_word=1)
    text = advice([narrow], 8)
    assert text.endswith(
        "not over 8, since layers.0.self_attn.k_proj has 32 output channels, in words of 8."
    )  # no advice


def test_one_group_per_row_may_be_split():
    assert parallel_degrees(mlp(29568, -1), 8) == DEGREES
    text = advice([Shape("x", 100, 64, -1)], 8)
    assert text.endswith("over 2 or 4 devices, not over 8, since x has 100 input channels.")


def test_no_group_size_is_proposed_that_does_not_help():
    assert "With group_size" not in advice([Shape("x", 3 * 32, 64, 32)], 8)  # the smallest
    assert "With group_size" not in advice([Shape("x", 3 * 16, 64, 16)], 8)  # smaller still
    assert "With group_size" not in advice([Shape("x", 96, 64, 96)], 1)  # 64 does not divide 96, 32 gives 3 groups


def test_only_larger_groups_are_made_smaller():
    # 12 groups of 128, of which 8 devices would need 24 groups of 64; 8 groups of 32, of which 64 would leave 4.
    linears = [Shape("a", 12 * 128, 64, 128), Shape("b", 8 * 32, 64, 32)]
    assert parallel_degrees(linears, 8) == (2, 4)
    assert advice(linears, 8).endswith("With group_size=64 they could split it over 2, 4 or 8.")


def test_words_are_not_named_where_a_word_is_one_channel():
    assert advice([Shape("x", HIDDEN, 30, 128)], 1).endswith(
        "over 2 devices, not over 4 or 8, since x has 30 output channels."
    )
