"""`--recipe`, and the line that says how far a run can move a weight."""

import argparse
import json

import pytest
from builders import build_header
from runs import Folders, generate

from models.restore import build_network
from train_deep_globe import main
from training.options import build_parser
from training.recipe import RECIPES, parse, reach_line
from utils.errors import InputError
from utils.settings import OF_WEIGHTS, RECORDED
from utils.stages import STAGES

MODERN = RECIPES["modern"]


def given(*arguments: str) -> argparse.Namespace:
    return parse(build_parser(), list(arguments))


def test_a_recipe_sets_what_is_not_given_and_the_default_is_released() -> None:
    released = vars(build_parser().parse_args(["--mode=2"]))
    assert vars(given("--mode=2")) == released
    for mode in (1, 2, 3):
        options = vars(given(f"--mode={mode}", "--recipe=modern"))
        for name, value in MODERN.items():
            expected = value[mode] if isinstance(value, dict) else value
            assert options[name] == (released[name] if mode > 1 and name in OF_WEIGHTS else expected)
    assert given("--recipe=modern", "--lr=0.5", "--loss=focal").lr == 0.5
    assert given("--recipe=modern", "--loss=focal").loss == "focal"
    assert vars(given("--recipe=modern", "--evaluation"))["loss"] == released["loss"]


def test_every_entry_of_a_recipe_is_an_option_with_a_valid_value() -> None:
    parser = build_parser()
    for name, value in MODERN.items():
        for one in value.values() if isinstance(value, dict) else (value,):
            parsed = getattr(parser.parse_args([f"--{name}={one}"]), name)
            assert parsed == one and type(parsed) is type(one), name
    assert set(OF_WEIGHTS) <= set(RECORDED)


@pytest.mark.parametrize(("lr", "warns"), [(2e-5, False), (1e-6, True)])
def test_a_run_that_can_hardly_move_a_weight_is_warned_of(lr, warns) -> None:
    model = build_network(build_header(2))
    model.learn(STAGES[2].trains)
    line, found = reach_line(lr, model, STAGES[2], 50 * 76)
    assert found == warns == ("train longer" in line)
    assert "released run of mode 2: 4.0" in line
    if not warns:
        assert "by 0.04, 4.0 standard deviations" in line


def test_the_options_of_a_recipe_are_recorded_one_by_one(tmp_path, caplog) -> None:
    folders = Folders(tmp_path, generate(tmp_path / "data", images=4, size=64))
    arguments = folders.arguments(1, "--recipe=modern", "--pyramid_width=4", "--num_epochs=1")
    with caplog.at_level("INFO"):
        assert main(arguments) == 0
    assert any("Reach:" in message and "hardly learns" in message for message in caplog.messages)
    (record,) = (json.loads(path.read_text()) for path in tmp_path.rglob("run.json"))
    options = record["options"]
    assert options["recipe"] == "modern" and options["pyramid_width"] == 4
    assert options["loss"] == MODERN["loss"] and options["pyramid_norm"] == "batch"
    with pytest.raises(InputError, match=r"invalid choice: 'x'"):
        given("--recipe=x")
