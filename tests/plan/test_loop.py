"""The loop in a plan's script. That it runs is tested with the whole script."""

from memlab.plan.loop import Model, loop_of


def test_the_loop_is_that_of_the_switches():
    model = Model("a model", "AutoConfig()", "AutoModel", True, 1000)
    plain = loop_of(model, set(), 4, 16, 1, True)
    assert "    loss = model(**batch).loss" in plain and plain[-1] == "    del loss"
    parts = loop_of(model, {"micro-batches"}, 4, 16, 2, True)
    assert "    micro_batches = split_batch(batch, 2)" in parts
    assert "        return (labels[:, 1:] != -100).sum()" in parts


def test_images_are_of_the_models_dtype():
    model = Model("a ViT", "AutoConfig()", "AutoModel", False, 1000, images=True)
    assert any("dtype=torch.float32" in line for line in loop_of(model, set(), 4, 0, 1, False))
    assert any("dtype=torch.bfloat16" in line for line in loop_of(model, set(), 4, 0, 1, True))
