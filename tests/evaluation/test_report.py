"""The report's page: every figure is the JSON's, and nothing that data or model wrote is markup."""

from __future__ import annotations

import copy
import html.parser
import json
import re
import shutil
import struct
import subprocess

import pytest
from toy import make_model
from toy_evaluation import make_prompt, run

from softprompt_fast.evaluation.baselines import CONDITIONS
from softprompt_fast.evaluation.report.page import page
from softprompt_fast.evaluation.report.plots import PLOTS, pictures

CURVE = {"step": [1, 2, 3], "loss": [2.0, 1.5, 1.25], "eval_step": [3], "eval_loss": [1.5]}
HOSTILE = (
    "</span></p><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    "{{ 7 * 7 }} \x00\x1b[2J\u202egnp.exe &amp; \" ' ` </style><h1>"
)


@pytest.fixture(scope="module")
def report():
    made = run(make_model(), make_prompt(make_model()), num_samples=2)
    made |= {
        "model": "toy",
        "objective": "kl",
        "context_of_training": True,
        "training_curve": CURVE,
    }
    return json.loads(json.dumps(made))


@pytest.fixture(scope="module")
def drawn(report):
    return pictures(report)


class Reader(html.parser.HTMLParser):
    """What a page holds: tags, attributes and figures with their place in the JSON."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.figures: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        given = dict(attrs)
        self._open = [given["data-json"], given["title"]] if "data-json" in given else None

    def handle_data(self, data):
        self.text += data
        if self._open is not None:
            self.figures.append((*self._open, data))
            self._open = None


def value_at(report, place):
    for key in place.split("/"):
        report = report[int(key) if isinstance(report, list) else key]
    return report


def test_every_figure_is_that_of_the_json(report, drawn):
    found = Reader(page(report, drawn)).figures
    for place, exact, shown in found:
        value = value_at(report, place)
        if isinstance(value, str):
            assert shown == value
            continue
        assert exact == repr(value)
        number = float(shown.rstrip("%").replace(",", "")) / (100 if shown.endswith("%") else 1)
        assert number == pytest.approx(value, abs=0.00501)
    places = {place for place, *_ in found}
    per_condition = {
        *("kl", "kl_standard_error", "kl_median", "kl_99", "kl_999", "kl_max", "top1_agreement"),
        *("rms_delta_p", "perplexity", "perplexity_ratio", "entropy", "calibration_error"),
        *("rank_correlation", "kl_recovered"),
    }
    assert per_condition == report["conditions"]["no context"].keys()
    assert places >= {f"conditions/{n}/{key}" for n in CONDITIONS for key in per_condition}
    assert "kl_recovered" in places


def test_the_page_needs_nothing_else(report, drawn):
    assert drawn.keys() == PLOTS.keys()
    reader = Reader(page(report, drawn))
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(reader.tags)
    sources = [value for name, value in reader.attributes if name in ("src", "href", "srcset")]
    assert len(sources) == len(PLOTS)
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert "default-src 'none'" in page(report, drawn)


def test_what_is_not_there_is_left_out(report):
    bare = copy.deepcopy(report)
    for name in ("training_curve", "objective", "context_of_training"):  # of a run
        del bare[name]
    bare |= {"answers": [], "kl_recovered": None}
    for row in bare["conditions"].values():
        row |= {"kl_standard_error": None, "kl_recovered": None, "rank_correlation": None}
    assert pictures(bare).keys() == PLOTS.keys() - {"training_curve"}
    text = Reader(page(bare, {})).text
    assert "What it answers" not in text
    assert "objective" not in text
    assert "None" not in text


@pytest.fixture(scope="module")
def hostile(report, drawn):
    """With HOSTILE wherever a text may come from data, a model or a tokenizer."""
    bad = copy.deepcopy(report)
    bad["model"] = bad["objective"] = bad["placement"] = HOSTILE
    for answer in bad["answers"]:
        answer |= dict.fromkeys(("query", *CONDITIONS), HOSTILE)
        for token in answer["tokens"]:
            token["text"] = HOSTILE
    for vector in bad["nearest_tokens"]:
        for token in vector["tokens"]:
            token["text"] = HOSTILE
    bad["answers"][0]["query"] = "<b>" * 4_000_000
    return page(bad, drawn)


def test_texts_stay_texts(hostile, report, drawn):
    clean, reader = page(report, drawn), Reader(hostile)
    assert reader.tags == Reader(clean).tags
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in reader.text
    assert not re.search("[\x00\x1b\u202e]", hostile)
    assert r"\x1b[2J\u202egnp.exe" in reader.text
    assert "(12,000,000 characters)" in reader.text
    assert len(hostile) < len(clean) + 1_000_000


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_shows_the_page_and_runs_nothing(hostile, tmp_path):
    (tmp_path / "evaluation.html").write_text(hostile)
    picture = tmp_path / "page.png"

    def chromium(*flags):
        # No network; and no sandbox, which a container does not allow.
        quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        page_url = (tmp_path / "evaluation.html").as_uri()
        return subprocess.run(
            [*command, *quiet, profile, "--proxy-server=127.0.0.1:9", *flags, page_url],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    document = Reader(chromium("--dump-dom").stdout)
    assert "script" not in document.tags
    assert "Soft prompt against context" in document.text
    assert "owned" not in re.search("<title>(.*?)</title>", hostile)[1]
    chromium(f"--screenshot={picture}", "--window-size=1100,1400", "--hide-scrollbars")
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert (width, height) == (1100, 1400)
    assert len(picture.read_bytes()) > 50_000  # a blank page has a few hundred
