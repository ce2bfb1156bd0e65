"""Tests run on the CPU, in one thread each, and leave torch's defaults as they found them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too: more than one only wait for each other

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# For each kind of device that is not there torch.manual_seed takes note of the whole stack.
seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _seeded():
    seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32


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
