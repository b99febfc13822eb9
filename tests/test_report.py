"""The report: its numbers against hand-worked ones, its safety, and the page in a real headless Chromium."""

import argparse
import json
import math
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_llava, tiny_rows

from aspo import page, report
from aspo.charts import MAX_POINTS, interval_chart, line_chart
from aspo.evaluation.metrics import BY_NAME, JudgedClaim, answer_counts, claim_counts
from aspo.evaluation.statistics import Estimate, compare
from aspo.folder import write_rows
from aspo.model import load_model, response_logps
from aspo.world.data import rows as world_rows
from aspo.world.scenes import COLOURS

EVIL = '<script>alert(1)</script> & "quotes" <img src=x onerror=alert(2)>.'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Tags with their attributes, and the text inside each element of one class."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.title = [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data
        if self.tags and self.tags[-1][0] == "title":
            self.title += data

    def find(self, tag, css_class=None):
        return [
            a for t, a in self.tags if t == tag and (css_class is None or css_class in (a.get("class") or "").split())
        ]


def _evaluation(path, false_share, seed=0, n=60):
    """A file as `aspo eval` writes it: n answers of five sentences each."""
    rng = np.random.default_rng(seed)
    items = []
    for k in range(n):
        false = rng.random(5) < false_share
        claims = [JudgedClaim(i, "false" if f else "true", (i, bool(f))) for i, f in enumerate(false)]
        counts = claim_counts(claims, [f"Sentence {i}." for i in range(5)], {(i, False) for i in range(5)}, 5)
        items.append({"id": str(k), "key": str(k), "counts": counts | answer_counts("x", 30, True)})
    path.write_text(json.dumps({"summary": {}, "items": items}))


def _run_folder(path, slope):
    path.mkdir(parents=True)
    history = [
        {
            "step": s,
            "loss": math.log(2) * math.exp(-slope * s / 50),
            "rewards/margins": slope * s / 50,
            "rewards/chosen": 0.1,
        }
        for s in range(1, 41)
    ]
    (path / "log_history.json").write_text(json.dumps([*history, {"step": 40, "train_runtime": 1.0}]))


def _world_pairs():
    """Rows of the world with one true and one false sentence each, and a row that tries to break the page."""
    rows = []
    for row in world_rows("train", 3):
        first, second = row["scene"]["things"][:2]
        wrong = next(c for c in COLOURS if c != second["colour"])
        chosen = f"The {first['shape']} is {first['colour']}. The {second['shape']} is {wrong}."
        cut = chosen.index(".") + 2
        spans = [[0, cut], [cut, len(chosen)]]
        rows.append(
            row | {"chosen": chosen, "rejected": EVIL, "chosen_sentences": spans, "chosen_similarity": [0.3, 0.1]}
        )
    evil = {"id": "evil", "chosen": EVIL, "rejected": "Nothing.", "chosen_sentences": [[0, len(EVIL)]]}
    return [*rows, rows[0] | evil | {"prompt": EVIL, "chosen_similarity": [0.2], "scene": None}]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(path of the report, its HTML) from two runs, three evaluations and four weighed rows."""
    folder = tmp_path_factory.mktemp("report")
    for name, share in (("base", 0.5), ("dpo", 0.4), ("aspo", 0.1)):
        _evaluation(folder / f"{name}.json", share)
    _run_folder(folder / "runs" / "dpo", 1.0)
    _run_folder(folder / "runs" / "aspo", 2.0)
    write_rows(folder / "pairs", _world_pairs())
    out = folder / "page" / "report.html"
    argv = ["--runs", folder / "runs/dpo", folder / "runs/aspo", "--data", folder / "pairs", "--title", f"Title {EVIL}"]
    argv += ["--evals", *(folder / f"{name}.json" for name in ("base", "dpo", "aspo"))]
    argv += ["--model", tiny_llava(folder / "model"), "--out", out]
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert report.run(parser.parse_args([str(a) for a in argv])) == 0
    return out, out.read_text(encoding="utf-8")


def test_the_page_stands_alone_and_runs_nothing(built):
    _, html = built
    parsed = Page(html)
    assert not parsed.find("script") and not parsed.find("link") and not parsed.find("iframe")
    assert all(image["src"].startswith("data:image/") for image in parsed.find("img")) and parsed.find("img")
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert not re.search(r"url\(|@import|https?://", html)
    policy = next(a["content"] for a in parsed.find("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy


def test_text_from_data_stays_text(built):
    _, html = built
    assert "<script" not in html and "onerror=alert(2)&gt;" in html
    assert Page(html).text.count(EVIL) >= 6  # title twice, prompt, a chosen and three rejected answers


def test_sentences_carry_their_weight_and_truth(built):
    _, html = built
    marks = Page(html).find("mark", "weighed")
    assert len(marks) == 7  # three rows of two, and the one whose only sentence must weigh 0
    assert all(mark["style"] == f"--w:{mark['data-weight']}" for mark in marks)
    assert ["false" in mark["class"].split() for mark in marks] == [False, True] * 3 + [False]
    assert marks[-1]["data-weight"] == "0.000"
    for first, second in zip(marks[0:6:2], marks[1:6:2], strict=True):  # S' is 1, 0; PPL' is 1, 0 or 0, 1
        assert (first["data-weight"], second["data-weight"]) in (("1.000", "0.000"), ("0.500", "0.500"))
    assert html.count("✓ true") == 3 and html.count("✗ false") == 3 and "it is " in html


def test_weights_are_aspos_by_hand(tmp_path):
    """w = alpha S' + (1 - alpha) PPL' from the model's own log-probabilities, worked out here in plain Python."""
    model, processor = load_model(tiny_llava(tmp_path))
    rows = tiny_rows(3)
    items = list(report.weigh(model, processor, rows, alpha=0.3))
    for row, item, batch in zip(rows, items, response_logps(model, processor, rows, batch_size=1), strict=True):
        layout, count = batch.layout, len(row["chosen_similarity"])
        perplexities = []
        for k in range(count):
            start, end = layout.sentence_offsets[k : k + 2].tolist()
            end -= (
                k == count - 1
            )  # the end-of-turn token belongs to the last sentence's log-ratio, not to its perplexity
            perplexities.append(math.exp(-batch.logps[start:end].mean().item()))
        scores = row["chosen_similarity"]
        for k, sentence in enumerate(item.chosen):
            s = (scores[k] - min(scores)) / (max(scores) - min(scores))
            p = (max(perplexities) - perplexities[k]) / (max(perplexities) - min(perplexities))
            assert sentence.perplexity == pytest.approx(perplexities[k], rel=1e-5)
            assert sentence.similarity == pytest.approx(scores[k], rel=1e-6)
            assert sentence.weight == pytest.approx(0.3 * s + 0.7 * p, abs=1e-4)
            assert sentence.verdict is None
        assert "".join(s.text for s in item.chosen) == row["chosen"]
        assert all(s.weight is None for s in item.rejected)


def test_table_shows_intervals_and_verdicts(built):
    _, html = built
    headline = html[html.index('id="headline"') : html.index("</table>")]
    row = re.search(r"hallucinated sentences \(%\)</th>(.*?)</tr>", headline).group(1)
    cells = re.findall(r"<td>(.*?)</td>", row)
    assert len(cells) == 6  # base, dpo, aspo, and three differences
    assert all('class="interval">[' in cell for cell in cells)
    assert 'class="better">better' in cells[4] and cells[4].startswith("−")  # aspo - base
    assert headline.count("worse") == 0
    assert "aspo: coverage +" in html and "read the rate beside coverage" in html


def test_a_difference_is_judged_by_its_interval_and_direction():
    lower, higher, neither = BY_NAME["shr"], BY_NAME["coverage"], BY_NAME["tokens"]
    down, unsure = Estimate(-0.1, -0.2, -0.05), Estimate(-0.1, -0.2, 0.05)
    assert [page.judge_difference(down, f) for f in (lower, higher, neither)] == ["better", "worse", ""]
    assert page.judge_difference(unsure, lower) == ""


def test_fairness_needs_coverage_and_length_within_two_percent():
    def items(said, tokens):
        claims = [JudgedClaim(i, "true", i) for i in range(said)]
        counts = claim_counts(claims, ["x"] * said, set(range(100)), 1) | answer_counts("x", tokens, True)
        return [{"id": "0", "counts": counts}]

    comparison = compare({"base": items(60, 100), "same": items(61, 99), "short": items(60, 97)})
    same, short = page.fairness(comparison)
    assert same == "same: coverage +1.7 %, length −1.0 % of base's: within 2 %, so the rates compare like with like."
    assert short.startswith("short: coverage +0.0 %, length −3.0 %") and "beside coverage" in short


def test_line_chart_draws_values_and_survives_what_runs_log():
    chart = line_chart("a", {"run": [(0, 0.0), (1, 1.0), (2, math.nan), (3, 0.5)]}, {"run": 1})
    path = re.search(r'<path class="line series-1" d="([^"]+)"', chart).group(1)
    assert path.count("M") == 2  # broken at the NaN
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    assert heights[1] < heights[2] < heights[0]  # y grows downwards: 1.0 above 0.5 above 0.0
    assert "not logged" in line_chart("a", {"run": [(1, math.inf)]}, {"run": 0})
    constant = line_chart("a", {"run": [(1, 0.25)]}, {"run": 0})
    assert "NaN" not in constant and "nan" not in constant
    many = line_chart("a", {"run": [(k, math.sin(k)) for k in range(1000)]}, {"run": 0})
    assert many.count("L") <= MAX_POINTS
    assert "&lt;b&gt;" in line_chart("<b>", {"<b>": [(1, 1), (2, 2)]}, {"<b>": 0})


def test_interval_chart_leaves_out_undefined_systems():
    nan = Estimate(math.nan, math.nan, math.nan)
    points = {"a": (Estimate(50, 45, 55), Estimate(30, 28, 33)), "b": (nan, Estimate(30, 28, 33))}
    chart = interval_chart("x", points, "x", "y", {"a": 0, "b": 1})
    assert ">a</text>" in chart and ">b</text>" not in chart


def test_history_comes_from_the_newest_state(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = json.dumps({"log_history": [{"step": step, "loss": 1.0}]})
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert report.read_history(tmp_path)[-1]["step"] == 10


def test_a_folder_has_no_ending(tmp_path):
    paths = [tmp_path / name for name in ("lr0.1", "lr0.5", "lr0.1.json")]
    for path in paths[:2]:
        path.mkdir()
    assert list(report.by_name(paths[:2], "--runs")) == ["lr0.1", "lr0.5"]
    assert list(report.by_name(paths[2:], "--evals")) == ["lr0.1"]  # the run's colour


def test_wrong_inputs_say_what_to_do(tmp_path):
    def run(*argv):
        parser = argparse.ArgumentParser()
        report.add_arguments(parser)
        report.run(parser.parse_args([*map(str, argv), "--out", str(tmp_path / "x.html")]))

    (tmp_path / "a").mkdir()
    for name in ("e.json", "a/e.json"):
        (tmp_path / name).write_text('{"items": [{"id": 1}]}')
    with pytest.raises(ValueError, match="nothing to report"):
        run()
    with pytest.raises(ValueError, match="no training log"):
        run("--runs", tmp_path)
    with pytest.raises(ValueError, match="not a file that `aspo eval` wrote"):
        run("--evals", tmp_path / "e.json")
    with pytest.raises(ValueError, match="both be called 'e'"):
        run("--evals", tmp_path / "e.json", tmp_path / "a/e.json")
    with pytest.raises(ValueError, match="--data and --model"):
        run("--data", tmp_path)
    assert not (tmp_path / "x.html").exists()


def _chromium(tmp_path, url, *flags):
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr"]
    command = [CHROMIUM, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={tmp_path / 'profile'}", *flags, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]  # what the page logs: a refused request, a broken style
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium in PATH: apt-get install chromium")
class TestInABrowser:
    def test_the_dom_holds_what_was_written(self, built, tmp_path):
        path, html = built
        dom = Page(_chromium(tmp_path, path.as_uri(), "--dump-dom"))
        assert len(dom.find("mark", "weighed")) == 7
        assert len(dom.find("svg", "chart")) == len(Page(html).find("svg", "chart")) == 4
        assert len(dom.find("article", "item")) == 4 and not dom.find("script")

    @pytest.mark.parametrize("width", [360, 820, 1280])
    def test_nothing_sticks_out(self, built, tmp_path, width):
        """Laid out at this width, no element reaches past the window but inside the boxes that scroll."""
        _, html = built
        wrapper = tmp_path / "wrapper.html"
        wrapper.write_text(
            f'<iframe srcdoc="{escape(html)}" style="width:{width}px;height:2000px;border:0"></iframe>'
            "<script>onload = () => {"
            "const inside = document.querySelector('iframe').contentDocument;"
            f"const out = [...inside.body.querySelectorAll('*')].filter(e => !e.closest('.scroll > *')"
            f" && e.getBoundingClientRect().right > {width} + 0.5).map(e => e.tagName + '.' + e.className);"
            "document.title = JSON.stringify([inside.querySelectorAll('mark').length, out]);}</script>"
        )
        dom = Page(_chromium(tmp_path, wrapper.as_uri(), "--window-size=1400,2200", "--dump-dom"))
        assert json.loads(dom.title) == [7, []]

    @pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (500, "light")])
    def test_it_looks_like_something(self, built, tmp_path, width, scheme):
        """The page's colours are where they should be: background, text, weighed sentences, both lines."""
        path, _ = built
        shot = tmp_path / "shot.png"
        flags = [f"--window-size={width},3000", f"--screenshot={shot}"]
        flags += ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
        _chromium(tmp_path, path.as_uri(), *flags)
        pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
        assert pixels.shape[1] == width

        def share(colour, tolerance=12):
            return float((abs(pixels - np.array(colour)).max(axis=-1) <= tolerance).mean())

        background, text = ((20, 23, 27), (232, 235, 238)) if scheme == "dark" else ((255, 255, 255), (28, 33, 39))
        assert share(background) > 0.2 and share(text) > 0.002
        strongest = (49, 90, 135) if scheme == "dark" else (132, 178, 228)  # weight 1 over a card
        assert share(strongest) > 0.0003
        orange, blue = ((240, 160, 75), (98, 181, 245)) if scheme == "dark" else ((179, 83, 0), (0, 105, 180))
        assert share(orange) > 0.0001 and share(blue) > 0.0001
