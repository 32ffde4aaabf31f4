"""Displacement figures are right, and a report says what its runs say, in one file that needs no other."""

import base64
import html
import json
import math
import re
import shutil
import subprocess
import warnings
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import pgdpo_fast as pf
from pgdpo_fast.analysis.displacement import one_step_advantage, outcome
from pgdpo_fast.analysis.report import Clip, ClipRow, render_report, sentence
from pgdpo_fast.analysis.runs import read_rows, read_runs
from pgdpo_fast.analysis.sampling import sample, sampling_times
from pgdpo_fast.analysis.verdict import FEWEST_PAIRS, KINDS, Verdict, headline, judge
from pgdpo_fast.cli import main
from pgdpo_fast.data.video import read_video
from pgdpo_fast.diffusion import DDPM, FlowMatching
from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.metrics import timestep_bins
from pgdpo_fast.training.callbacks import AdvantageProbe
from pgdpo_fast.training.trainer import train

# -- the one-step advantage


class Problem:
    """A small convolution, a batch of three pairs and a reference a little way off."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        self.network = nn.Conv3d(2, 2, 3, padding=1).to(dtype)
        self.x, self.target = torch.randn(2, 6, 2, 2, 4, 4, dtype=dtype)
        with torch.no_grad():
            prediction = self.network(self.x)
            self.reference = pf.reference_errors(prediction + 0.05 * torch.randn_like(prediction), self.target)

    def advantage(self, objective, baseline=None, **options):
        baseline = baseline or pf.DPO(beta=100.0)
        return one_step_advantage(
            lambda: self.network(self.x), self.network.parameters(), self.target, self.reference,
            objective=objective, baseline=baseline, backend="eager", **{"learning_rate": 1e-7, **options},
        )  # fmt: skip


@pytest.mark.parametrize("objective", [pf.PGDPO(), pf.PGDPO.equation(), pf.SFT(), pf.DPOP(beta=100.0)], ids=repr)
def test_the_exact_advantage_approaches_its_first_order_form(objective):
    problem, errors = Problem(), []
    for rate in (1e-5, 1e-6):
        found = problem.advantage(objective, learning_rate=rate)
        assert found.exact == pytest.approx(found.objective_change - found.baseline_change)
        errors.append(abs(found.exact / found.first_order - 1))
    assert errors[1] < 1e-3 and errors[1] < 0.2 * errors[0]  # the difference is of second order in the rate


def test_the_first_order_form_alone_is_the_same_number():
    problem = Problem()
    alone = problem.advantage(pf.PGDPO(), exact=False)
    assert alone.first_order == pytest.approx(problem.advantage(pf.PGDPO()).first_order, rel=1e-9)
    assert alone.exact is None


def test_an_objective_has_no_advantage_over_itself():
    found = Problem().advantage(pf.DPO(beta=100.0))
    assert found.exact == 0 and found.first_order == 0 and found.objective_change == found.baseline_change != 0


def test_a_pure_likelihood_step_beats_dpo_which_must_share_its_step_with_the_rejected_clip():
    assert Problem().advantage(pf.PGDPO()).exact > 0


def test_probing_changes_neither_weights_nor_gradients():
    problem = Problem(torch.float32)
    before = [parameter.clone() for parameter in problem.network.parameters()]
    with torch.no_grad():  # as a trainer calls it
        problem.advantage(pf.PGDPO(), learning_rate=1.0)
    for parameter, start in zip(problem.network.parameters(), before, strict=True):
        assert torch.equal(parameter, start) and parameter.grad is None


def test_weights_too_coarse_for_a_small_step_are_refused():
    with pytest.raises(ConfigError, match="bfloat16.*exact=False"):
        Problem(torch.bfloat16).advantage(pf.PGDPO())


def test_the_probe_leaves_the_run_bit_for_bit_as_it_was(tiny_config):
    plain = train(tiny_config("plain"), display="none")
    probed = train(tiny_config("probed"), display="none", callbacks=[AdvantageProbe()])
    losses = [[row["loss"] for row in read_rows(run.run_dir / "metrics.jsonl")] for run in (plain, probed)]
    assert losses[0] == losses[1]
    rows = read_rows(probed.run_dir / "displacement.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert row["advantage"] == pytest.approx(row["first_order"], rel=0.2) and row["baseline_beta"] == 100
        assert len(row["ids"]) == 2


def test_a_resumed_run_rewrites_the_probes_it_makes_again(tiny_config):
    train(tiny_config(), display="none", callbacks=[AdvantageProbe()])
    result = train(tiny_config(training={"steps": 6}), display="none", callbacks=[AdvantageProbe()])
    assert [row["step"] for row in read_rows(result.run_dir / "displacement.jsonl")] == [0, 2, 4, 6]


# -- runs and outcomes


def write_run(folder, *, name="dpo", chosen=0.0, margin=0.0, spread=1e-3, steps=30, evaluated=True, pairs=8,
              **objective):  # fmt: skip
    """A run whose rewards move linearly to `chosen` and `margin`, its pairs scattering by `spread`."""
    folder.mkdir(parents=True)
    weights, count = {"name": name, "beta": 100.0, **objective}, pairs
    (folder / "config.yaml").write_text(json.dumps({"objective": weights, "training": {"seed": 0, "steps": steps}}))

    def row(step):
        scatter = [spread * (-1) ** pair for pair in range(count)]
        share = step / steps
        pairs = {
            "id": [f"pair {pair}" for pair in range(count)],
            "chosen": [chosen * share + value for value in scatter],
            "rejected": [(chosen - margin) * share for _ in scatter],
            "margin": [margin * share + value for value in scatter],
            "alpha": [1.0 if name == "dpo" else 0.5 + 0.04 * pair for pair in range(count)],
            "gamma": [1.0 if name == "dpo" else 0.5 - 0.04 * pair for pair in range(count)],
            "timestep": [124.9 * (pair + 1) for pair in range(count)],
        }
        return {
            "step": step, "loss": 0.69 - 0.1 * share, "step_seconds": 0.1, "rewards/chosen": chosen * share,
            "rewards/rejected": (chosen - margin) * share, "rewards/margins": margin * share,
            "rewards/accuracies": 0.5 + share / 2, "pairs": pairs,
        }  # fmt: skip

    def write(file, steps):
        (folder / file).write_text("".join(json.dumps(row(step)) + "\n" for step in steps))

    write("metrics.jsonl", range(1, steps + 1))
    if evaluated:
        write("evaluation.jsonl", range(0, steps + 1, 10))
    return folder


@pytest.mark.parametrize(
    ("chosen", "margin", "kind"),
    [(-0.1, 0.2, "displaced"), (0.1, 0.2, "improved"), (1e-5, 0.2, "held"), (-0.1, 1e-5, "unlearnt"),
     (0.1, -0.2, "reversed"), (float("nan"), float("nan"), "unmeasured")],
)  # fmt: skip
@pytest.mark.parametrize("evaluated", [True, False])
def test_an_outcome_is_called_by_two_standard_errors(tmp_path, chosen, margin, kind, evaluated):
    (run,) = read_runs([write_run(tmp_path / "run", chosen=chosen, margin=margin, evaluated=evaluated)])
    assert outcome(run).kind == kind


SIGNS = {"below": -1.0, "zero": 0.0, "above": 1.0}


@pytest.mark.parametrize(
    ("chosen", "margin", "kind", "tone"),
    [("below", "below", "reversed", "bad"), ("zero", "below", "reversed", "bad"), ("above", "below", "reversed", "bad"),
     ("below", "zero", "unlearnt", "bad"), ("zero", "zero", "unlearnt", "bad"), ("above", "zero", "unlearnt", "bad"),
     ("below", "above", "displaced", "bad"), ("zero", "above", "held", "neutral"),
     ("above", "above", "improved", "good")],
)  # fmt: skip
@pytest.mark.parametrize("held_out", [True, False])
def test_every_combination_of_signs_has_its_verdict(chosen, margin, kind, tone, held_out):
    for size, error in ((1.0, 0.4), (1e-9, 4e-10), (117.0, 1e-3), (1e300, 0.0)):
        found = judge(
            SIGNS[chosen] * size, error * size, SIGNS[margin] * size, error * size, pairs=4, held_out=held_out
        )
        assert (found.kind, found.chosen, found.tone) == (kind, chosen, tone)


def test_two_standard_errors_are_not_yet_told_from_zero():
    assert judge(2.0, 1.0, 5.0, 1.0, pairs=8).chosen == judge(-2.0, 1.0, 5.0, 1.0, pairs=8).chosen == "zero"
    assert judge(5.0, 1.0, 2.0, 1.0, pairs=8).kind == judge(5.0, 1.0, -2.0, 1.0, pairs=8).kind == "unlearnt"


@pytest.mark.parametrize("pairs", range(FEWEST_PAIRS))
@pytest.mark.parametrize("chosen", [-117.0, 0.0, 117.0])
@pytest.mark.parametrize("margin", [-27.0, 0.0, 27.0])
@pytest.mark.parametrize("error", [0.0, 1.0, math.nan])
def test_too_few_pairs_are_a_verdict_of_their_own(pairs, chosen, margin, error):
    found = judge(chosen, error, margin, error, pairs=pairs)
    assert found.badge == "unknown: too few held-out pairs" and found.tone == "neutral"
    assert judge(chosen, error, margin, error, pairs=pairs, held_out=False).badge == "unknown: too few pairs"


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_makes_the_outcome_unknown(place, value):
    figures = [0.1, 0.01, 0.2, 0.01]
    figures[place] = value
    found = judge(*figures, pairs=8)
    assert found.kind == "unknown" and found.tone == "neutral" and "not finite" in found.badge


def test_a_run_without_a_reference_has_no_rewards_to_judge():
    assert judge(*[math.nan] * 4, pairs=8, measured=False).kind == "unmeasured"


def verdict(kind):
    return Verdict.unknown("too few held-out pairs") if kind == "unknown" else Verdict.of(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_headline_of_one_run_praises_only_what_was_kept(kind):
    said = headline({"DPO": verdict(kind)}, baseline="DPO")
    assert ("without losing" in said) == (kind == "improved") and "No displacement" not in said and said.endswith(".")
    assert ("unknown: too few held-out pairs" in said) == (kind == "unknown")


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_a_headline_of_two_runs_names_both_and_credits_none_falsely(first, second):
    said = headline({"DPO": verdict(first), "PG-DPO": verdict(second)}, baseline="DPO")
    assert "PG-DPO" in said and "DPO" in said.replace("PG-DPO", "")
    assert ("did not." in said) == ({first, second} in ({"displaced", "improved"}, {"displaced", "held"}))
    assert ("No displacement" in said) == (first == second == "improved")
    assert ("above zero" in said) == (first == second == "improved")


def test_the_report_of_one_held_out_pair_says_that_it_cannot_tell(tmp_path):
    folder = write_run(tmp_path / "run", chosen=-117.0, margin=-27.0, pairs=1)
    report = render_report([folder], tmp_path)
    page = report.html.read_text()
    assert report.headline == "What DPO came to is unknown: too few held-out pairs."
    assert "unknown: too few held-out pairs</span>" in page and "badge neutral" in page
    assert "means over 1 pair, too few held-out pairs" in page
    assert "±" not in re.search(r'class="hero">.*?</p>', page, flags=re.S)[0]
    assert 'class="down"' not in page and 'class="up"' not in page


def test_a_margin_surely_below_zero_is_not_called_near_zero(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run", chosen=-117.0, margin=-27.0)])
    said = sentence(outcome(run), 0)
    assert "below zero by more than two standard errors" in said and "worse at the chosen clips" in said
    assert "within two standard errors" not in said


def test_identical_curves_are_said_to_be_identical(tmp_path):
    runs = [write_run(tmp_path / name, name=name, chosen=0.1, margin=0.2) for name in ("dpo", "pgdpo", "ipo")]
    other = write_run(tmp_path / "sdpo", name="sdpo", chosen=0.1, margin=0.1)
    assert render_report([*runs, other], tmp_path).headline.startswith(
        "DPO, PG-DPO and IPO have identical reward curves."
    )
    assert "identical" not in render_report([runs[0], other], tmp_path).html.read_text()


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"name": "pgdpo", "beta": 100.0}, "β differs between the objectives (DPO 5000, PG-DPO 100)"),
        ({"name": "pgdpo", "beta": 5000.0}, None),
        ({"name": "slic", "beta": 100.0, "hinge": False}, None),  # its loss has no beta
        ({"name": "safeguarded", "base": {"name": "dpo", "beta": 7.0}}, "(DPO 5000, Safeguarded DPO 7)"),
        ({"name": "dpo", "beta": 100.0}, None),  # one objective: their labels and the table say it
    ],
)
def test_a_comparison_of_objectives_says_when_beta_differs(tmp_path, second, said):
    runs = [write_run(tmp_path / "first", beta=5000.0), write_run(tmp_path / "second", **second)]
    report = render_report(runs, tmp_path)
    assert ("β differs" in report.headline) == (said is not None)
    assert said is None or (said in report.headline and said in report.html.read_text())


def test_figures_come_from_held_out_pairs_where_there_are_any(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run", chosen=-0.1, margin=0.2)])
    assert run.curve("rewards/chosen")[0] == [0, 10, 20, 30]
    assert outcome(run).chosen_reward == -0.1
    (run,) = read_runs([write_run(tmp_path / "other", chosen=-0.3, margin=0.2, evaluated=False)])
    assert outcome(run).chosen_reward == pytest.approx(-0.3 * 29 / 30)  # mean over the last tenth of the steps


def test_timestep_bins_hold_every_pair_once():
    pairs = {"timestep": [0.0, 199.9, 200.0, 999.9, 1000.0], "margin": [1.0, -1.0, 1.0, 1.0, -1.0]}
    pairs |= {name: [1.0, 3.0, 5.0, 7.0, 9.0] for name in ("chosen", "rejected", "alpha", "gamma")}
    rows = [{"pairs": pairs}, {"pairs": pairs}]
    table = [item for item in timestep_bins(rows, ("chosen", "rejected", "alpha", "gamma")) if item["pairs"]]
    bins = [(row["low"], row["high"], row["pairs"]) for row in table]
    assert bins == [(0, 200, 4), (200, 400, 2), (800, 1000, 4)]
    assert [row["accuracy"] for row in table] == [0.5, 1.0, 0.5] and [row["chosen"] for row in table] == [2, 5, 8]


def test_runs_of_one_objective_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "b")] + [write_run(tmp_path / "c", name="pgdpo")]
    assert [run.label for run in read_runs(folders)] == ["DPO (a)", "DPO (b)", "PG-DPO"]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')
    (run,) = read_runs([folder])
    assert run.step == 30


def test_what_is_missing_or_damaged_is_named_with_its_remedy(tmp_path):
    folder = write_run(tmp_path / "run")
    with pytest.raises(DataError, match="no config.yaml.*pgdpo-fast train"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="twice"):
        read_runs([folder, folder])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:-5], *lines[2:], ""]))
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2.*delete"):
        read_runs([folder])
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no finished step"):
        read_runs([folder])
    (folder / "config.yaml").write_text("objective: [")
    with pytest.raises(DataError, match="config.yaml.*damaged"):
        read_runs([folder])


# -- the report


def check_self_contained(page):
    """No address, no file beside the page: everything it loads is in it."""
    page = page.replace("http://www.w3.org/", "")  # names of XML vocabularies, never fetched
    assert "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in re.sub(
        r"url\(#", "", page)  # fmt: skip
    for source in re.findall(r'\b(?:src|href|data)="([^"#][^"]*)"', page):
        assert source.startswith("data:"), source


def figures_of(page):
    """Every figure, parsed as XML, by its id."""
    return {key: ElementTree.fromstring(svg) for key, svg in
            re.findall(r'id="figure-([\w-]+)">.*?(<svg.*?</svg>)', page, flags=re.S)}  # fmt: skip


def check_finite_drawing(figure):
    paths = [element.get("d", "") for element in figure.iter("{http://www.w3.org/2000/svg}path")]
    assert any(paths) and not any("nan" in path or "inf" in path for path in paths)


def test_a_comparison_shows_every_figure_and_says_what_happened(tmp_path):
    runs = [write_run(tmp_path / "dpo", chosen=-0.1, margin=0.2),
            write_run(tmp_path / "pgdpo", name="pgdpo", chosen=0.02, margin=0.1)]  # fmt: skip
    (runs[1] / "displacement.jsonl").write_text('{"step": 10, "advantage": 1e-4}\n{"step": 20, "advantage": -1e-4}\n')
    frames = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    clips = [ClipRow("a <b>red</b> circle", [Clip("data", frames), Clip("DPO", frames + 128)])]
    report = render_report(runs, tmp_path / "out", clips=clips)
    page, summary = report.html.read_text(), json.loads(report.summary.read_text())
    check_self_contained(page)
    figures = figures_of(page)
    assert set(figures) == {"chosen", "rejected", "margin", "accuracy", "alpha", "gamma", "advantage", "loss",
                            "seconds", "timestep-accuracy", "timestep-chosen"}  # fmt: skip
    for figure in figures.values():
        check_finite_drawing(figure)
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert report.headline in page and report.headline.startswith("DPO paid") and "PG-DPO did not" in report.headline
    assert "&lt;b&gt;red" in page
    dpo, pgdpo = summary["methods"]["DPO"], summary["methods"]["PG-DPO"]
    assert dpo["chosen_reward"] == -0.1 and dpo["margin"] == 0.2 and dpo["gamma_positive_share"] is None
    assert pgdpo["gamma_positive_share"] == 0.5 and pgdpo["step_seconds"] == 0.1 and summary["seed"] == 0
    assert summary["differing_settings"]["objective.name"] == {"DPO": "dpo", "PG-DPO": "pgdpo"}
    assert summary["versions"]["pgdpo_fast"] == pf.__version__


def test_clips_in_the_page_are_videos(tmp_path):
    ramp = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 24, 24, 3) * 60
    report = render_report([write_run(tmp_path / "run")], tmp_path, clips=[ClipRow("ramp", [Clip("data", ramp)])])
    (video,) = re.findall(r"data:video/mp4;base64,([\w+/=]+)", report.html.read_text())
    (tmp_path / "clip.mp4").write_bytes(base64.b64decode(video))
    decoded = read_video(tmp_path / "clip.mp4")
    assert decoded.shape == (4, 192, 192, 3)
    assert (decoded.float().mean((1, 2, 3)) - torch.tensor([0.0, 60, 120, 180])).abs().max() < 4


@pytest.mark.parametrize(
    ("dpo", "pgdpo", "expected"),
    [((-0.1, 0.2), (0.1, 0.2), "DPO paid for its margin with the chosen clips. PG-DPO did not."),
     ((0.1, 0.2), (0.1, 0.3), "No displacement here: DPO and PG-DPO kept the chosen reward above zero."),
     ((0.1, 0.2), (-0.1, 0.2), "PG-DPO paid for its margin with the chosen clips. DPO did not."),
     ((-0.1, 0.2), (-0.1, 0.3), "DPO and PG-DPO won the margin and lost the chosen clips: displacement."),
     ((0.0, 0.0), (1e-5, 0.0), "DPO and PG-DPO did not learn the preference."),
     ((0.0, 0.0), (0.0, 0.0),
      "DPO and PG-DPO have identical reward curves. DPO and PG-DPO did not learn the preference."),
     ((-117.0, -27.0), (0.1, 0.2), "PG-DPO learnt the preference without losing the chosen clips. "
      "DPO learnt the opposite: the margin is below zero.")],
)  # fmt: skip
def test_the_headline_follows_the_figures_not_the_hope(tmp_path, dpo, pgdpo, expected):
    runs = read_runs([write_run(tmp_path / name, name=name, chosen=chosen, margin=margin)
                      for name, (chosen, margin) in (("dpo", dpo), ("pgdpo", pgdpo))])  # fmt: skip
    report = render_report([run.path for run in runs], tmp_path / "out")
    assert report.headline == expected


def test_any_trained_run_can_be_reported(tiny_config, tmp_path, capsys):
    """From the command line, without held-out pairs, with an objective that needs no reference."""
    for number, objective in enumerate(({"name": "slic"}, {"name": "pgdpo"})):
        config = tiny_config(f"run{number}", objective=objective, data={"evaluation_pairs": 0}, training={"steps": 2})
        train(config, display="none")
    folders = [str(tmp_path / f"run{number}") for number in range(2)]
    assert main(["report", folders[0]]) == 0
    assert main(["report", *folders, "--out", str(tmp_path / "both"), "--title", "Two runs"]) == 0
    assert str(tmp_path / "both" / "report.html") in capsys.readouterr().out
    page = (tmp_path / "both" / "report.html").read_text()
    check_self_contained(page)
    assert "Two runs" in page and "training batches" in page
    for figure in figures_of(page).values():
        check_finite_drawing(figure)
    assert json.loads((tmp_path / "run0" / "summary.json").read_text())["methods"]["SLiC"]["steps"] == 2


def test_a_folder_without_a_run_is_one_line_on_the_command_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == DataError.exit_code
    assert capsys.readouterr().err.count("\n") == 1


AWKWARD = ["$\\bad{$", "一只猫 قطة 👩‍👩‍👧", "x[/v2] <b>&", "a\x1b[31m\x07b", "w" * 200, "long words " * 15]


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """A comparison of runs whose folders, and a clip whose prompt and label, are named as nobody should."""
    root = tmp_path_factory.mktemp("awkward")
    figures = [(-0.1, 0.2, 8), (0.1, 0.2, 8), (-0.1, -0.2, 8), (0.1, 0.2, 1), (0.0, 0.2, 8), (0.0, 0.0, 8)]
    runs = [write_run(root / name, name="pgdpo", chosen=chosen, margin=margin, pairs=pairs)
            for name, (chosen, margin, pairs) in zip(AWKWARD, figures, strict=True)]  # fmt: skip
    clip = Clip(f"PG-DPO ({'w' * 200})", torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    rows = [ClipRow(" ".join(AWKWARD), [clip, clip])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return render_report(runs, root / "out", clips=rows, title=AWKWARD[0])


def test_names_of_any_script_and_kind_are_shown_as_they_are(awkward):
    page = awkward.html.read_text()
    assert list(awkward.outcomes)[0] == "PG-DPO ($\\bad{$)" and r"PG-DPO (a\x1b[31m\x07b)" in awkward.outcomes
    assert "\x1b" not in page and "PG-DPO (v2] &lt;b&gt;&amp;)" in page and "قطة" in page
    for figure in figures_of(page).values():
        check_finite_drawing(figure)


def test_the_names_beside_the_lines_are_short_and_differ(awkward):
    texts = ["".join(text.itertext()) for text in figures_of(awkward.html.read_text())["margin"].iter(
        "{http://www.w3.org/2000/svg}text")]  # fmt: skip
    names = [text for text in texts if text.startswith("PG-DPO")]
    assert len(set(names)) == len(AWKWARD) and all(len(name) <= 20 for name in names)


LAYOUT = """<script>addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument, right = page.documentElement.clientWidth, faults = [];
  if (page.documentElement.scrollWidth > right) faults.push("page scrolls sideways");
  for (const card of page.querySelectorAll(".card"))
    for (const inner of card.querySelectorAll("h3, p, span, b, dd, dt, video"))
      if (!inner.closest(".scroll") && inner.getBoundingClientRect().right > card.getBoundingClientRect().right + 1)
        faults.push(inner.tagName + " leaves its card: " + inner.textContent.slice(0, 40));
  document.title = "checked: " + faults.join("; ");
})</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium to lay the page out")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_leaves_its_card_and_no_page_scrolls_sideways(awkward, tmp_path, width):
    page = html.escape(awkward.html.read_text())
    (tmp_path / "frame.html").write_text(
        f'{LAYOUT}<body><iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe></body>'
    )
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom",
         f"--user-data-dir={tmp_path}/profile", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert re.search(r"<title>(checked: .*?)</title>", shown.stdout).group(1) == "checked: "


# -- sampling


class Oracle:
    """An adapter whose network knows the clean latents and predicts exactly."""

    def __init__(self, process, clean):
        self.process, self.clean = process, clean

    def collate(self, rows):
        return {"text": torch.stack([row["text"] for row in rows])}

    def predict(self, model, batch):
        noised, t = batch.noised, batch.model_timestep
        assert batch.conditioning["text"].shape == (2, 3, 5)
        t = t / 1000 if isinstance(self.process, FlowMatching) else t
        t = t.double() if t.is_floating_point() else t
        clean = self.clean.expand_as(noised)
        if isinstance(self.process, FlowMatching):
            noise = (noised - (1 - t.view(-1, 1, 1, 1, 1)) * clean) / t.view(-1, 1, 1, 1, 1)
        else:
            signal = self.process.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
            noise = (noised - signal.sqrt() * clean) / (1 - signal).sqrt()
        return self.process.target(clean, noise.float(), t)


@pytest.mark.parametrize("process", [FlowMatching(shift=3.0), DDPM(prediction="v", zero_terminal_snr=True)], ids=str)
@pytest.mark.parametrize("steps", [1, 7])
def test_exact_predictions_sample_the_clean_clip(process, steps):
    clean = torch.randn(1, 2, 2, 4, 4)
    text, model = [{"text": torch.zeros(3, 5)}] * 2, nn.Linear(1, 1)
    found = sample(Oracle(process, clean), model, process, text, (2, 2, 4, 4), seed=0, ids=["a", "b"], steps=steps)
    torch.testing.assert_close(found, clean.expand_as(found), atol=2e-4, rtol=0)


def test_sampling_starts_at_pure_noise_and_descends():
    for process, first in ((FlowMatching(shift=5.0), 1.0), (DDPM(), 999)):
        times = sampling_times(process, 10)
        assert times[0] == first and (times.diff() < 0).all()
    with pytest.raises(ConfigError, match="steps=0"):
        sampling_times(FlowMatching(), 0)
