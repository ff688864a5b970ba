import pytest
from hypothesis import given
from hypothesis import strategies as st
from thread_processes import ThreadProcesses, in_threads

from zsnr_diffusers.utils.distributed import ProcessError, Processes, launched_processes


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_are_all_of_it_in_order_and_even(n, size):
    shares = [ThreadProcesses(rank, size, None, None).split(range(n)) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_has_everything(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = launched_processes()
    assert type(processes) is Processes
    assert processes.is_main
    assert processes.split([1, 2]) == [1, 2]
    assert processes.gather("a") == ["a"]
    with pytest.raises(KeyError), processes.sync_errors():
        raise KeyError
    processes.close()


def test_every_process_gets_all_values_in_order():
    assert in_threads(3, lambda processes: processes.gather(processes.rank * 10)) == [[0, 10, 20]] * 3


def test_an_error_in_one_process_stops_all_with_its_message():
    def fail_in_the_middle(processes):
        with processes.sync_errors():
            if processes.rank == 1:
                raise ZeroDivisionError("no bread")
        raise AssertionError("nobody gets here")

    first, second, third = in_threads(3, fail_in_the_middle)
    assert isinstance(second, ZeroDivisionError)
    for other in (first, third):
        assert isinstance(other, ProcessError)
        assert str(other) == "process 1: no bread"


def test_an_error_without_words_is_called_by_its_name():
    def fail(processes):
        with processes.sync_errors():
            if processes.rank == 0:
                raise MemoryError

    assert str(in_threads(2, fail)[1]) == "process 0: MemoryError"


def test_going_on_together():
    def work(processes):
        with processes.sync_errors():
            value = processes.rank
        return processes.gather(value)

    assert in_threads(2, work) == [[0, 1]] * 2


def test_what_the_main_process_alone_does_is_known_to_all():
    calls = []

    def work(processes):
        return processes.run_on_main(lambda: calls.append(processes.rank) or [processes.rank, None])

    assert in_threads(3, work) == [[0, None]] * 3
    assert calls == [0]
    assert Processes().run_on_main(lambda: None) is None


def test_the_main_process_goes_first():
    calls = []

    def work(processes):
        return processes.main_first(lambda: calls.append(processes.rank) or processes.rank)

    assert in_threads(3, work) == [0, 1, 2]
    assert calls[0] == 0
    assert sorted(calls) == [0, 1, 2]


def test_where_the_main_process_fails_the_others_do_not_begin():
    calls = []

    def fail(processes):
        def work():
            calls.append(processes.rank)
            raise OSError("no disk")

        return processes.main_first(work)

    first, second = in_threads(2, fail)
    assert isinstance(first, OSError)
    assert str(second) == "process 0: no disk"
    assert calls == [0]
