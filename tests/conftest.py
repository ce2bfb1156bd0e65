"""Tests run on the CPU, in one thread each, and leave torch's defaults as they found them."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too: more than one only wait for each other

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# For each kind of device that is not there torch.manual_seed takes note of the whole stack.
seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


def pytest_collection_finish():
    """What all the modules hold is not looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def fewer_estimates(monkeypatch):
    """What --log-quality compares, without the estimates of many candidates, which only take longer."""
    from evograd.lab.methods import MetaStep
    from evograd.lab.quality import QualityLog

    few = lambda estimates: {name: e for name, e in estimates.items() if "_k10" not in name and "_k50" not in name}
    add, all_of = QualityLog.add, MetaStep.estimates
    monkeypatch.setattr(QualityLog, "add", lambda log, step, estimates, device: add(log, step, few(estimates), device))
    monkeypatch.setattr(MetaStep, "estimates", lambda *problem, **settings: few(all_of(*problem, **settings)))


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def refused(capsys):
    """refused(main, arguments, words): the script ends with exit code 2 and a message with the words in it, returned."""

    def check(main, arguments, words=()):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        message = capsys.readouterr().err
        for word in [words] if isinstance(words, str) else words:
            assert word in message
        return message

    return check
