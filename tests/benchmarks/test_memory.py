"""The count of what autograd keeps, on layers of which it is known."""

from torch import nn

from benchmarks.speed import memory


def test_an_image_keeps_what_the_layers_need_for_their_gradients(capsys):
    """A linear layer keeps its input, 12 numbers, and a ReLU its output, 5, in bf16 in half of the bytes; the weights
    in bf16 are kept once and not for each image."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU())
    assert memory.an_image(encoder, 4, 2, amp=False) == 4 * (12 + 5)
    assert memory.an_image(encoder, 4, 2, amp=True) == 2 * (12 + 5)
    assert memory.kept_bytes(encoder, 4, 2, amp=False) == 4 * 4 * (12 + 5)
    memory.main(["--arch", "test_resnet@16", "--batch", "2"])
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| test_resnet, 16 | 0.4 | 6 | ")
