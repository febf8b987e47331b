"""The benchmark of the host's share of the loss calls both ways, on a machine without a GPU."""

import pytest

from moco import kernels


@pytest.fixture
def bench(script, monkeypatch):
    made = script("speed.host_time")
    monkeypatch.setattr(made, "CALLS", 2)
    return made


def test_both_ways_are_called(bench, monkeypatch, capsys):
    called = []
    for name, way in (("_operator", kernels._operator), ("_Eager", kernels._Eager)):
        monkeypatch.setattr(kernels, name, spy(way, name, called))
    assert bench.main(["--n", "4", "--rounds", "2"]) == 0
    assert called.count("_operator") == called.count("_Eager") == 2 * (1 + 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["operator", "eager", "a small operator"]
    assert lines[0].endswith("1.000 of the operator's (1.000 to 1.000)")


def spy(way, name, called):
    """The operator, or the function whose ``apply`` is called, noted by name."""

    class Spy:
        def __call__(self, *given):
            called.append(name)
            return way(*given)

        def apply(self, *given):
            called.append(name)
            return way.apply(*given)

    return Spy()
