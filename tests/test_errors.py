import json

import pytest
from conftest import ROOT
from tsfm import __main__ as command_line
from tsfm.errors import CaseError, first_cause
from tsfm.errors import _show as show
from tsfm.options import OptionError, check_options, config_files


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"epochs": 1, "network_def": {"features": [1]}, "train#dataset": {}}))
    return str(path)


@pytest.mark.parametrize("listed", ["{}", "['{}']", "[{}]"])
def test_a_mistyped_option_is_refused_with_the_nearest_name(config, listed):
    with pytest.raises(OptionError, match=r"--epoch \(did you mean --epochs\?\)"):
        check_options(["monai.bundle", "run", "--config_file", listed.format(config), "--epoch", "4"])
    with pytest.raises(OptionError, match="--xyzzy"):
        check_options(["monai.bundle", "run", f"--config_file={config}", "--xyzzy=4"])


@pytest.mark.parametrize("option", ["--epochs", "--network_def#features", "--train::dataset", "--tracking", "--run_id"])
def test_known_ids_and_monais_own_options_pass(config, option):
    check_options(["monai.bundle", "run", "--config_file", config, option, "1"])


def test_none_is_refused_where_monai_would_drop_it(config, tmp_path):
    with pytest.raises(
        OptionError, match=r"--network_def None would change nothing: MONAI drops .*--network_def '\$None'"
    ):
        check_options(["monai.bundle", "run", "--config_file", config, "--network_def", "None"])
    overlay = tmp_path / "more.json"
    overlay.write_text('{"network_def": null}')
    check_options(["monai.bundle", "run", "--config_file", f"['{config}','{overlay}']", "--network_def", "None"])
    check_options(["monai.bundle", "run", "--config_file", config, "--network_def", "$None"])


def test_a_network_def_that_is_replaced_whole_is_refused_with_what_to_do(tmp_path):
    train, overlay = ROOT / "bundles/tsfm_finetune/configs/train.json", tmp_path / "own.json"
    command = ["monai.bundle", "run", "--config_file", f"['{train}','{overlay}']"]
    network = {"_target_": "UNet", "spatial_dims": 3}
    overlay.write_text(json.dumps({"network_def": network}))
    with pytest.raises(OptionError, match=r"lacks 'name'.*\"network_def#name\".*changes\.md"):
        check_options(command)
    for more in ({"name": None}, {}):
        overlay.write_text(json.dumps({"network_def": network | more, **({} if more else {"network_def#name": None})}))
        check_options(command)


def test_an_option_of_an_overlay_that_is_not_listed_is_refused(config, tmp_path):
    overlay = tmp_path / "clicks.json"
    overlay.write_text('{"click_sigma": 2.0, "epochs": "$int(@click_sigma)"}')
    with pytest.raises(OptionError, match=r"--click_sigma belongs to clicks\.json, which --config_file does not list"):
        check_options(["monai.bundle", "run", "--config_file", config, "--click_sigma", "3"])
    check_options(["monai.bundle", "run", "--config_file", f"['{config}','{overlay}']", "--click_sigma", "3"])


def test_texts_of_a_command_stay_texts_and_other_values_are_read(monkeypatch):
    said = []

    def count(dataset_dir: "str", trained_on: "str | None" = None, folds=None, **settings):
        said.append((dataset_dir, trained_on, folds, settings))

    monkeypatch.setattr(command_line, "commands", lambda: {"count": lambda: count})
    for words in (
        ["2024", "--trained_on", "LiTS, KiTS19", "--folds", "[0,1]", "--epochs", "3"],
        ["1e5", "--trained_on=None"],
        ["None"],
    ):
        monkeypatch.setattr("sys.argv", ["tsfm", "count", *words])
        command_line.main()
    assert said == [("2024", "LiTS, KiTS19", [0, 1], {"epochs": 3}), ("1e5", None, None, {}), ("None", None, None, {})]


def test_a_command_says_what_it_cannot_do_without_and_what_no_option_is(monkeypatch):
    def words_of(*words):
        monkeypatch.setattr("sys.argv", ["tsfm", *words])
        with pytest.raises(SystemExit) as end:
            command_line.main()
        return str(end.value)

    said = words_of("pool", "--dataset_dir", "/data")
    assert said.startswith("tsfm: pool needs --pool_file (the JSON that declares data sets,")
    assert said.endswith("all options: python -m tsfm pool --help")
    said = words_of("evaluate", "out", "--pool-file=pool.json", "truth")
    assert "needs --output_dir (for cases.csv" in said and " and " not in said.partition("(")[0]
    assert words_of("pool", "--help") == "0"
    said = words_of("evaluate", "a", "b", "c", "d", "--tolerance_mm", "3")
    assert said.startswith("tsfm: evaluate has no option --tolerance_mm (did you mean 'tolerances_mm'?); all options")
    assert "has no option --lable_ids (did you mean 'label_ids'?)" in words_of("plan", "data", "--lable_ids", "{}")
    assert "has no option" not in words_of("plan", "/nowhere", "--notimed")
    assert "no.json" in words_of("pool", "no.json"), "what is given without its name counts"


def test_other_programs_are_left_alone():
    check_options(["pytest", "--anything"])


def test_an_error_made_for_the_user_is_not_unwrapped():
    """MONAI wraps in RuntimeError; what the package raised from an OSError says what to do about it."""
    inner, wrapped = CaseError("a.nii.gz ends too early: copy it again"), RuntimeError("component failed")
    inner.__cause__, wrapped.__cause__ = EOFError("compressed file ended"), inner
    assert first_cause(wrapped) is inner


@pytest.mark.parametrize(("place", "number"), [("tsfm.cases.folders", ()), ("elsewhere", ()), ("tsfm.files", (13,))])
def test_what_the_package_says_of_files_needs_no_traceback(place, number, capsys):
    try:
        exec(
            "raise FileExistsError(*words)",
            {"__name__": place, "words": (*number, "a.nii.gz is there: choose another folder")},
        )
    except FileExistsError as error:
        wrapped = RuntimeError("component failed")
        wrapped.__cause__ = error
        show(type(wrapped), wrapped, None)
    said = capsys.readouterr().err
    assert said.rstrip().endswith("a.nii.gz is there: choose another folder")
    assert ("component failed" in said) == (place == "elsewhere" or bool(number))


def test_ids_in_an_args_file_are_compared_with_the_configs_too(tmp_path):
    (tmp_path / "train.json").write_text('{"epochs": 1}')
    arguments = ["run", "--args_file", str(tmp_path / "args.json")]
    for content, wrong in (({"epoch": 2}, "no id for --epoch"), ({"epochs": "two"}, "a whole number")):
        listed = {"config_file": [str(tmp_path / "train.json")], **content}
        (tmp_path / "args.json").write_text(json.dumps(listed))
        with pytest.raises(OptionError, match=wrong):
            check_options(arguments)
    assert config_files(arguments) == [str(tmp_path / "train.json")]
    check_options([*arguments, "--epochs", "3"])  # the command line has the last word


def test_the_first_cause_is_found():
    inner = ValueError("inner")
    middle, outer = RuntimeError("middle"), RuntimeError("outer")
    middle.__cause__, outer.__cause__ = inner, middle
    assert first_cause(outer) is inner
