"""Processes that should meet: nonsense in the environment, and others that never come, are said in one line."""

from datetime import timedelta

import pytest
from runs import free_port

from utils import distributed
from utils.distributed import ALONE, Ranks
from utils.errors import InputError

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Ranks:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return distributed.start("cpu")


def test_a_world_of_one_or_none_is_a_single_process_and_an_environment_without_sense_refused(monkeypatch) -> None:
    for environment in ({}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": ""}):
        assert start(monkeypatch, **environment) == ALONE
        assert distributed.world_size() == 1
    second_of_four = {"WORLD_SIZE": "4", "RANK": "1"}
    for environment, told in (
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE 4, but RANK is not set: start with torchrun .*, or unset WORLD_SIZE"),
        (second_of_four, "but MASTER_ADDR is not set"),
        ({**second_of_four, "MASTER_ADDR": "localhost"}, "but MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "but RANK is 2"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', not a number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1', not a number"),
    ):
        with pytest.raises(InputError, match=told):
            start(monkeypatch, **environment)


def test_a_process_that_nobody_answers_says_so_and_ends(monkeypatch, capsys) -> None:
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=2))
    monkeypatch.setattr(distributed, "TOLD_AFTER", 0.1)
    port, told = free_port(), r"process 1 of 2 did not meet the others at localhost:\d+ .* within 2 s"
    with pytest.raises(InputError, match=told):
        start(monkeypatch, WORLD_SIZE="2", RANK="1", MASTER_ADDR="localhost", MASTER_PORT=port)
    assert f"process 1 waits for the others at localhost:{port}" in capsys.readouterr().err


def test_what_fails_in_one_process_fails_in_all() -> None:
    def fail() -> None:
        raise InputError("a.png is broken", "unreadable")

    assert ALONE.together(lambda: 3) == 3
    with pytest.raises(InputError, match=r"a\.png is broken") as raised:
        ALONE.together(fail)
    assert raised.value.kind == "unreadable"
