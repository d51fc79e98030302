"""The HTML report, on runs made up here: what it shows, what it survives, and that no story can break out of it."""

import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from storygen.cli import InputError
from storygen.report import write_report

HOSTILE = '</script><script>document.title="broken out"</script><img src=x onerror=\'document.title="broken out"\'>{{ 7*7 }} & <!--'
SENTENCES = (
    "The ferry left without its captain, and nobody on the bank thought that strange.",
    '"You had better sit down," said the clerk, and pushed a chair across the room.',
    "By the third winter the well had learned her name.",
    "He counted the spoons again, and again there was one too many.",
    "A lamp moved behind the curtain of the empty house.",
    "She wrote the answer on her hand, where the rain could not reach it.",
)


def write_run(folder: Path, steps: int = 60, prompts: int = 6, per_step: int = 4, story_sentences: int = 12) -> Path:
    """A run whose reward rises, with an evaluation at every tenth of it."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)

    def text(count: int) -> str:
        return "\n".join(" ".join(draw.choices(SENTENCES, k=3)) for _ in range(max(1, count // 3)))

    def sample(step: int, prompt: str, split: str, quality: float) -> dict:
        verdict = "ok" if draw.random() < 0.6 + 0.35 * quality else draw.choice(["no_eos", "two_story_tags", "empty_think"])
        parts = {k: min(1.0, max(0.0, draw.gauss(quality, 0.15))) for k in ("correlation", "length", "repetition", "prose")}
        return {
            "step": step,
            "prompt": prompt,
            "think": text(3),
            "story": text(story_sentences),
            "finished": verdict != "no_eos",
            "verdict": verdict,
            "reward": sum(parts.values()) / 4 if verdict == "ok" else -1.0,
            "parts": parts,
            "guards": {"copy": 1.0 if draw.random() < 0.9 else 0.4, "stop_words": 1.0},
            "raw": {"recall": draw.random(), "words": 120},
            "advantage": None if split == "validation" else draw.gauss(0, 1),
            "split": split,
        }

    with open(folder / "metrics.jsonl", "w") as metrics, open(folder / "samples.jsonl", "w") as samples:
        for step in range(steps + 1):
            quality = 0.3 + 0.5 * step / steps
            row = {"step": step}
            if step:
                row |= {
                    "objective/reward": draw.gauss(quality, 0.05),
                    "objective/kl": 0.05 * math.sqrt(step),
                    "objective/entropy": 4.2 - quality,
                    "objective/beta": 0.05,
                    "guards/copy": draw.gauss(0.95, 0.01),
                    "guards/stop_words": draw.gauss(0.99, 0.005),
                    "policy/lr": 1e-5,
                    "policy/clipfrac": 0.1,
                    "length/target": 90 + step // 2,
                    "length/median": draw.gauss(90 + step / 2, 6),
                    "length/p90": draw.gauss(140 + step / 2, 9),
                    "samples/well_formed": min(1.0, draw.gauss(0.6 + 0.35 * quality, 0.04)),
                    "time/tokens_per_second": draw.gauss(2100, 60),
                }
                row |= {f"parts/{k}": draw.gauss(quality, 0.06) for k in ("correlation", "length", "repetition", "prose")}
            if step % max(1, steps // 10) == 0:
                row |= {
                    "eval/reward": quality,
                    "eval/samples/well_formed": 0.6 + 0.35 * quality,
                    "eval/parts/correlation": quality,
                }
                held = [sample(step, f"Held-out prompt number {p}.", "validation", quality) for p in range(prompts)]
                samples.writelines(json.dumps(row) + "\n" for row in held)
            metrics.write(json.dumps(row) + "\n")
            fresh = [f"Write about lamp number {step * per_step + p}." for p in range(per_step if step else 0)]
            samples.writelines(json.dumps(sample(step, prompt, "train", quality)) + "\n" for prompt in fresh)
    (folder / "run.json").write_text(json.dumps({"lr": 1e-5, "reward": {"length": {"weight": 0.2}}, "note": "<b>bold</b>"}))
    return folder


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def browse(page: Path, profile: Path, *options: str) -> str:
    """The document after its scripts have run, from headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium or google-chrome on PATH")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=4000", "--dump-dom", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=40, check=True).stdout


def test_headline_numbers_compare_the_last_evaluation_with_the_first(tmp_path):
    page = write_report(write_run(tmp_path / "run"))
    text = page.read_text("utf-8")
    assert page == tmp_path / "run" / "report.html"
    assert "+0.500" in text and "from 0.300" in text and "0.800" in text
    assert "well formed" in text and "from 0.705" in text
    assert "reward.length.weight" in text and "&lt;b&gt;bold" in text
    data = embedded(text)
    assert len(data["samples"]) == 11 * 6 + 60 * 4
    assert data["curves"]["eval/reward"] == [list(range(0, 61, 6)), [round(0.3 + 0.05 * i, 3) for i in range(11)]]


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    text = write_report(write_run(tmp_path / "run", steps=10)).read_text("utf-8")
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", text)
    assert not re.search(r"https?://|src=|@import|url\(", outside)


def test_a_run_that_is_still_going_can_be_reported(tmp_path):
    run = write_run(tmp_path / "run", steps=10)
    whole = embedded(write_report(run, tmp_path / "whole.html").read_text("utf-8"))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(run / name, "ab") as file:
            file.write('{"step": 11, "objective/reward": 0.9, "prompt": "Ein Männ'.encode()[:-1])
    assert embedded(write_report(run, tmp_path / "torn.html").read_text("utf-8")) == whole


def test_missing_and_odd_values_do_not_break_it(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "objective/reward": NaN, "a": 1e400, "b": null, "c": "x", "d": 2}\n[1]\n\n'
    )
    (run / "samples.jsonl").write_text(
        '{}\n{"step": 1, "story": null, "parts": {"x": NaN}, "reward": NaN, "think": "\\ud800"}\n'
    )
    data = embedded(write_report(run).read_text("utf-8"))
    assert data["curves"] == {"d": [[1.0], [2.0]]}
    assert [s["reward"] for s in data["samples"]] == [None, None]
    (run / "samples.jsonl").unlink()
    assert embedded(write_report(run).read_text("utf-8"))["samples"] == []


def test_a_malformed_sample_shows_no_guards_since_none_was_measured(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    row = {"step": 1, "verdict": "no_eos", "reward": -1, "parts": {"length": 0.0}, "guards": {"copied": 0.0}}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = embedded(write_report(run).read_text("utf-8"))["samples"]
    assert sample["guards"] == {} and sample["parts"] == {}


def test_without_evaluations_the_ends_of_training_are_compared(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": i, "objective/reward": i / 100, "parts/prose": 1 - i / 100} for i in range(1, 21)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(run).read_text("utf-8")
    assert "mean of the last 2 steps" in text
    assert "+0.180" in text and "from 0.015" in text and "−0.180" in text


def test_an_empty_run_is_one_line(tmp_path):
    with pytest.raises(InputError, match="metrics.jsonl"):
        write_report(tmp_path)


def test_a_hundred_thousand_samples_stay_small_and_keep_the_extremes(tmp_path):
    run = write_run(tmp_path / "run", steps=20, prompts=8, per_step=20)
    lines = (run / "samples.jsonl").read_text().splitlines()
    draw = random.Random(1)
    long_story = "\n".join(" ".join(draw.choices(SENTENCES, k=3)) for _ in range(8)) + "\n<é>" * 50
    with open(run / "samples.jsonl", "w") as file:
        for i in range(100_000):
            row = f'{{"step": {i // 50}, "split": "train", "verdict": "ok", "reward": {i % 997 / 1000}'
            file.write(f'{row}, "prompt": "p{i}", "think": "t", "story": {json.dumps(long_story)}}}\n')
        file.write('{"step": 7, "split": "train", "reward": 5.0, "story": "the best", "prompt": "p"}\n')
        file.write("\n".join(lines) + "\n")
    page = write_report(run)
    assert page.stat().st_size < 15_000_000
    data = embedded(page.read_text("utf-8"))
    assert max(s["reward"] for s in data["samples"]) == 5.0
    held = {s["step"] for s in data["samples"] if s["split"] == "validation"}
    assert {0, 20} <= held
    assert len(data["samples"]) == 1500
    assert len({s["step"] for s in data["samples"]}) >= 50


def test_stories_as_long_as_books_stay_under_the_bound(tmp_path):
    run = write_run(tmp_path / "run", steps=4)
    story = json.dumps("<&>" * 20_000)
    with open(run / "samples.jsonl", "w") as file:
        rest = f'"split": "train", "prompt": "p", "think": "t", "story": {story}'
        file.writelines(f'{{"step": {i}, "reward": {i}, {rest}}}\n' for i in range(300))
    page = write_report(run)
    assert page.stat().st_size < 15_000_000
    assert max(s["reward"] for s in embedded(page.read_text("utf-8"))["samples"]) == 299


def test_no_text_can_break_out_of_the_page(tmp_path):
    run = write_run(tmp_path / "run", steps=10)
    row = {"step": 1, "split": "train", "reward": 9, "parts": {HOSTILE: 1}, "guards": {HOSTILE: 0.1}, "raw": {HOSTILE: 1}}
    row |= {"prompt": HOSTILE, "think": HOSTILE, "story": HOSTILE, "verdict": HOSTILE}
    with open(run / "samples.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 11, HOSTILE: 1.0, f"eval/parts/{HOSTILE}": 1.0}) + "\n")
    (run / "run.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    page = write_report(run)
    text = page.read_text("utf-8")
    assert text.count("</script>") == 2 and "<img" not in text
    assert HOSTILE in [s["story"] for s in embedded(text)["samples"]]

    dom = browse(page, tmp_path / "profile")
    assert 'data-ready="yes"' in dom
    assert "<title>run · story-gen report</title>" in dom and "<img" not in dom
    assert dom.count('<article class="card">') == 12 + 2
    assert "&lt;img src=x onerror=" in dom


def test_the_browser_draws_every_section(tmp_path):
    dom = browse(write_report(write_run(tmp_path / "run")), tmp_path / "profile")
    assert 'data-ready="yes"' in dom
    for section in ("curves", "compare", "stories"):
        assert re.search(f'<section id="{section}">', dom), section
    assert dom.count("<svg") >= 14 and "NaN" not in dom


def test_the_browsers_filters_work_by_click(tmp_path):
    """Everything a reader can click, clicked by a script at the page's end, and what the page then holds."""
    page = write_report(write_run(tmp_path / "run"))
    presses = """<script>{
      const say = (text) => document.body.append(Object.assign(document.createElement("pre"), { textContent: text }));
      const choose = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
      const cards = () => document.querySelectorAll("#cards .card").length;
      const before = cards(); $("f-more").click(); say(`more ${before} ${cards()}`);
      choose("f-step", "12"); choose("f-split", "validation");
      say("steps " + [...new Set([...document.querySelectorAll("#cards .head")].map((h) => h.children[1].textContent))].join());
      choose("f-step", ""); choose("f-order", "worst");
      const rewards = [...document.querySelectorAll("#cards .head b")].map((b) => +b.textContent.replace("−", "-"));
      say("sorted " + rewards.every((r, i) => !i || rewards[i - 1] <= r));
      $("f-prompt").value = "no such prompt"; $("f-prompt").dispatchEvent(new Event("input")); say("none " + cards());
      const first = $("pair-text").textContent; $("pair-next").click(); say("moved " + (first !== $("pair-text").textContent));
      const word = document.querySelector("#pair .answered"); word.dispatchEvent(new Event("pointerenter"));
      say("lit " + document.querySelectorAll("#pair .answers").length);
      word.dispatchEvent(new Event("pointerleave")); say("dark " + document.querySelectorAll("#pair .answers").length);
    }</script>"""
    pressed = tmp_path / "pressed.html"
    pressed.write_text(page.read_text("utf-8").replace("</body>", presses + "</body>"), "utf-8")
    said = dict(re.findall(r"<pre>(\w+) (.*?)</pre>", browse(pressed, tmp_path / "profile")))
    assert said["more"] == "12 24" and said["steps"] == "step 12" and said["sorted"] == "true" and said["none"] == "0"
    assert said["moved"] == "true" and int(said["lit"]) >= 1 and said["dark"] == "0"


def test_what_human_stories_earn_is_a_band_behind_their_curve(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    name = next(key for key in json.loads(lines[0]) if key.startswith(("parts/", "eval/parts/"))).split("parts/")[1]
    human = {
        f"human/parts/{name}/p10": 0.4,
        f"human/parts/{name}/p90": 0.9,
        "human/reward/p10": 0.5,
        "human/reward/p90": None,
    }
    lines[0] = json.dumps(json.loads(lines[0]) | human)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(run)
    data = embedded(page.read_text("utf-8"))
    assert data["human"] == {name: [0.4, 0.9]} and not any(key.startswith("human") for key in data["curves"])
    steps, medians = data["curves"]["reward/p50"]
    rewards = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    of_first = [row["reward"] for row in rewards if row["split"] == "train" and row["step"] == steps[0]]
    assert medians[0] == pytest.approx(float(np.median(of_first)), rel=1e-4)
    assert browse(page, tmp_path / "profile").count('class="human"') == 1
