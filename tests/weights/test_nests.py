"""Of several dictionaries in a file, which holds the encoder, and what the rest is called."""

import pytest
import torch

from moco.weights.nests import choose_nest


def network(layers):
    return {f"layer{n}.weight": torch.ones(1) for n in range(layers)}


@pytest.mark.parametrize("head", ["online_classifier", "query_head", "teacher"])
@pytest.mark.parametrize("known", [lambda tensors: False, lambda tensors: len(tensors) == 50])
def test_a_head_is_no_encoder_whatever_it_is_called(head, known):
    assert choose_nest({head: network(2), "backbone": network(50)}, known).name == "backbone"


def test_a_small_network_that_is_known_is_taken():
    assert choose_nest({"queries": network(2), "all": network(50)}, lambda tensors: len(tensors) == 2).name == "queries"


@pytest.mark.parametrize("layers", [20, 50, 120])
def test_a_teacher_that_is_taken_is_told_of_beside_students_of_any_size(layers):
    chosen = choose_nest({"student": network(layers), "teacher": network(50)}, lambda tensors: True)
    if layers == 120:  # less than half of it
        assert (chosen.name, chosen.others) == ("student", ("teacher",))
    else:
        assert (chosen.name, chosen.others) == ("teacher", ("student",))
