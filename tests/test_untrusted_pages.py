"""Texts from strangers in what we write: pages, in a parser and in a real browser, Markdown tables, and names."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from aspo import page
from aspo.evaluation.metrics import JudgedClaim, answer_counts, claim_counts
from aspo.evaluation.statistics import compare, markdown
from aspo.recipes.recipe import load_recipe
from aspo.report import read_evaluation, read_history

HOSTILE = (
    "<script>document.documentElement.dataset.owned = 1</script>",
    '"><img src=x onerror="document.documentElement.dataset.owned = 1">',
    "' onmouseover='document.documentElement.dataset.owned=1' onfocus='document.documentElement.dataset.owned=1' x='",
    "</script></style></title></svg></textarea><svg onload=document.documentElement.dataset.owned=1><script>",
    "</title><iframe srcdoc='<script>parent.document.documentElement.dataset.owned=1</script>'></iframe>",
    "<!-- ]]> --!> ${sections} $title %s {0} </main><form action=http://127.0.0.1:9><button autofocus>",
    "\u2028</p>\u2029<base href='http://127.0.0.1:9/'>\x00\x0b<meta http-equiv=refresh content='0;url=x:1'>\ud800",
    "javascript:document.documentElement.dataset.owned=1//`${alert(1)}`&lt;b&gt;&#60;i&#62;",
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def page_of(text):
    """A report in which `text` stands wherever something of others can: names, ids, prompts, answers, notes."""
    claims = [JudgedClaim(0, "false", 0), JudgedClaim(1, "true", 1)]
    counts = claim_counts(claims, [text, text], {1}, 2) | answer_counts(text, 30, True)
    items = [{"id": text, "key": text, "counts": counts}] * 1
    comparison = compare({f"a{text}": items, f"b{text}": items}, resamples=100)
    styles = {f"a{text}": 0, f"b{text}": 1}
    history = {name: [{"step": n, "loss": 1.0 / n} for n in (1, 2, 3)] for name in styles}
    sentence = page.Sentence(text, 0.5, 0.2, 3.0, verdict="false", note=text)
    unweighed = page.Sentence(text, verdict="false", note=text)
    item = page.Item(text, text, [sentence, sentence], [unweighed], [Image.new("RGB", (24, 16))])
    sections = [
        page.headline_section(comparison, styles),
        page.curves_section(history, styles),
        page.items_section([item]),
        page.figures_section(comparison),
    ]
    return page.render(text, text, sections), markdown(comparison)


def skeleton(html):
    """Tags with the names of their attributes, in order."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, given: found.append((tag, tuple(name for name, _ in given)))
    parser.handle_endtag = lambda tag: found.append(("/" + tag, ()))
    parser.feed(html)
    return found


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_text_adds_no_element_and_no_attribute_to_a_page(text):
    html, table = page_of(text)
    assert skeleton(html) == skeleton(page_of("plain")[0])
    assert "default-src 'none'" in html and "base-uri 'none'" in html and "form-action 'none'" in html
    assert "<" not in table and len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium in PATH: apt-get install chromium")
@pytest.mark.parametrize("policy", [True, False], ids=["as it is", "without its policy"])
def test_in_a_browser_no_text_runs(policy, tmp_path):
    """All hostile texts at once; without the page's policy it is the escaping alone that holds."""
    html = page_of(" ".join(HOSTILE))[0]
    if not policy:
        head, _, rest = html.partition('<meta http-equiv="Content-Security-Policy"')
        html = head + rest.partition(">")[2]
    (tmp_path / "page.html").write_text(html, encoding="utf-8", errors="replace")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [
        "--enable-logging=stderr",
        "--virtual-time-budget=2000",
        "--dump-dom",
        (tmp_path / "page.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "data-owned" not in done.stdout.partition("<head>")[0] and "CONSOLE" not in done.stderr
    plain = skeleton(page_of("plain")[0])
    assert [t for t in skeleton(done.stdout) if t[0] in ("script", "iframe", "form", "base", "meta")] == [
        t for t in plain if t[0] == "meta" and (policy or t[1] != ("http-equiv", "content"))
    ]
    assert len([t for t in skeleton(done.stdout) if t[0] == "img"]) == 1
    # That the check can fail: the same text, written as it is.
    (tmp_path / "page.html").write_text(f"<!doctype html><html><head></head><body>{HOSTILE[0]}", encoding="utf-8")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "data-owned" in done.stdout.partition("<head>")[0]


def test_names_of_recipes_are_one_line_that_tables_can_hold(tmp_path):
    for name in ("a|b", "a\nb: {train.beta: 9}", "<b>a</b>", "`a`", "", "\u202ea"):
        (tmp_path / "r.yaml").write_text(json.dumps({"name": name, "train": {}}))
        with pytest.raises(ValueError, match=r"r\.yaml: name is .*(one line|must be a text)"):
            load_recipe(tmp_path / "r.yaml")


def test_a_report_reads_no_other_files(tmp_path):
    for name, content in {
        "a": "[" * 99_999,
        "b": '{"items": [1]}',
        "c": '{"items": [{"counts": {"x": "y"}}]}',
        "d": "\x00",
        "e": '{"items": [{"counts": {"x": 1}}]}',
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} is n"):
            read_evaluation(tmp_path / name)
    for content in ("{", "[1]", '{"log_history": 3}', "null"):
        (tmp_path / "log_history.json").write_text(content)
        with pytest.raises(ValueError, match=r"log_history\.json is no"):
            read_history(tmp_path)
