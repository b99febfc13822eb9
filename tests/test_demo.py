"""`aspo demo`: what it runs, and what it says of the figures. The commands themselves have tests of their own."""

import importlib
import json
from pathlib import Path

import pytest

from aspo import cli, demo
from aspo.evaluation.metrics import JudgedClaim, answer_counts, claim_counts
from aspo.world import assets_dir


def _arguments(*argv):
    parser = cli.Parser()
    demo.add_arguments(parser)
    return parser.parse_args(list(map(str, argv)))


def _flags(arguments):
    """["eval", "--model", "world", "--questions", "2"] -> {"--model": ["world"], "--questions": ["2"]}"""
    flags = {}
    for argument in arguments[1:]:
        if argument.startswith("--"):
            flags[argument] = values = []
        else:
            values.append(argument)
    return flags


def test_every_command_takes_its_arguments():
    for arguments in demo.commands(Path("out"), demo.FULL, 0).values():
        parser = cli.Parser(prog=arguments[0])
        importlib.import_module(cli.COMMANDS[arguments[0]][0]).add_arguments(parser)
        parser.parse_args(arguments[1:])


def test_dpo_and_aspo_differ_in_the_objective_alone():
    commands = demo.commands(Path("out"), demo.FULL, 7)
    dpo, aspo = (_flags(commands[f"train {name}"]) for name in ("DPO", "ASPO"))
    assert {key for key in dpo.keys() | aspo.keys() if dpo.get(key) != aspo.get(key)} == {
        "--loss_type",
        "--output_dir",
    }
    assert (dpo["--loss_type"], aspo["--loss_type"]) == (["dpo"], ["aspo"])
    evals = [_flags(commands[f"eval {name}"]) for name in demo.SYSTEMS]
    for flags in evals[1:]:
        assert {key for key in flags if flags[key] != evals[0].get(key)} == {"--adapter", "--out"}


def test_the_test_split_is_opened_by_evaluation_only():
    for stage, arguments in demo.commands(Path("out"), demo.FULL, 0).items():
        assert ("world:test" in arguments) == stage.startswith("eval")
    assert demo.FULL.scenes >= 1000


def _fake_commands(ran, shares):
    """Stands in for `aspo.cli.main`; evaluations get `shares` of false claims."""

    def main(arguments):
        ran.append(arguments[0])
        print("chatter")
        if arguments[0] == "eval":
            out = Path(_flags(arguments)["--out"][0])
            out.parent.mkdir(exist_ok=True)
            items = []
            for k in range(40):
                false = (k % 10) < 10 * shares[out.stem]
                counts = claim_counts([JudgedClaim(0, "false" if false else "true", 0)], ["x"], {0}, 1)
                items.append({"id": str(k), "counts": counts | answer_counts("x", 5, True)})
            out.write_text(json.dumps({"items": items}))
        return 0

    return main


def test_it_runs_everything_in_turn_and_tells_what_came_out(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(cli, "main", _fake_commands(ran, {"base": 0.5, "DPO": 0.5, "ASPO": 0.9}))
    assert demo.run(_arguments("--out", tmp_path)) == 0
    assert ran == ["pairs", "score", "train", "train", "eval", "eval", "eval", "report"]
    printed = capsys.readouterr().out
    assert "chatter" not in printed and "chatter" in (tmp_path / "demo.log").read_text()
    assert "DPO against base: hallucinated sentences 0.0 points [0.0, 0.0]: no difference" in printed
    assert "ASPO against DPO: hallucinated sentences +40.0 points" in printed and ": worse" in printed
    assert "SMOKE" not in printed
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["systems"]["ASPO"]["hallucinated_sentences"][0] == pytest.approx(0.9)
    assert table["differences"]["ASPO - base"]["hallucinated_sentences"][0] == pytest.approx(0.4)
    assert table["size"]["scenes"] == demo.FULL.scenes and set(table["seconds"]) == set(
        demo.commands(tmp_path, demo.FULL, 0)
    )
    assert "| hallucinated sentences (%) " in (tmp_path / "table.md").read_text()


def test_quick_says_that_it_means_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "main", _fake_commands([], dict.fromkeys(demo.SYSTEMS, 0.5)))
    assert demo.run(_arguments("--out", tmp_path, "--quick", "--scenes", 5)) == 0
    printed = capsys.readouterr().out
    assert "SMOKE RUN: too small to mean anything" in printed
    assert "--limit 5 " in printed and f"--limit {demo.QUICK.pairs} " in printed


def test_a_failing_command_ends_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "main", lambda arguments: 130 if arguments[0] == "score" else 0)
    assert demo.run(_arguments("--out", tmp_path)) == 130
    assert "'score' ended with status 130" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--steps is 0"):
        demo.run(_arguments("--out", tmp_path, "--steps", 0))


def _has_world():
    try:
        return bool(assets_dir())
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _has_world(), reason="needs the world's models: python -m aspo.world.build")
def test_quick_for_real(tmp_path, capsys):
    """All commands on the real models; run again, everything is found done and the table is the same."""
    assert demo.run(_arguments("--out", tmp_path, "--quick")) == 0
    first = (tmp_path / "table.md").read_text()
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("DPO", "ASPO")]
    assert records[0]["pairs_sha256"] == records[1]["pairs_sha256"] and records[0]["pairs"] >= 16
    html = (tmp_path / "report.html").read_text()
    assert html.count('class="item"') == 12 and "reward margin" in html and "✓ true" in html
    adapter = tmp_path / "ASPO" / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    assert demo.run(_arguments("--out", tmp_path, "--quick")) == 0
    assert (tmp_path / "table.md").read_text() == first and adapter.stat().st_mtime_ns == before
    assert "SMOKE RUN" in capsys.readouterr().out
