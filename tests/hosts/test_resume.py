"""What a run keeps: the best state, an early end, and checkpoints from which it goes on bit for bit."""

import copy
import json
import signal
import subprocess
import sys

import pytest
import torch

from subspan import io
from subspan.cli import finetune, main
from subspan.hosts import lessons
from subspan.hosts.keep import History, Keeper, Keeping, clear, ours, plain, vacate
from subspan.hosts.lessons import batches_of, fit, keeper_for, learning
from subspan.hosts.samples import Rows, Sample
from subspan.hosts.samples import split as split_rows
from subspan.hosts.score import nll
from subspan.hosts.training import shown
from subspan.optim import Optim, Sgd, checkpoint

IDS = torch.arange(900) * 37 % 300
STEPS = 12
ALIKE = {"batch": 2, "seed": 3}


def data(kind: str = "text") -> lessons.Split:
    if kind == "text":
        return lessons.split(IDS, 12)
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(300, (int(torch.randint(4, 14, (), generator=g)),), generator=g) for _ in range(30)]
    return split_rows([Sample(x, x) for x in ids])


def begun(model, method: str):
    torch.manual_seed(3)
    given = {} if method == "adamw" else {"rank": 3}
    return learning(model, method, steps=STEPS, every=4 if method == "galore" else None, **given)


def run(model, method, keeping=None, kind="text", every=3, lr=1e-2):
    learns = begun(model, method)
    model.config.attention_dropout = 0.2
    return fit(model, learns, data(kind), steps=STEPS, every=every, keeping=keeping, lr=lr, **ALIKE)


def check_same(one, two):
    have, want = one.state_dict(), two.state_dict()
    assert have.keys() == want.keys()
    assert [name for name, x in have.items() if not torch.equal(x, want[name])] == []


# ---- resume


RUNS = [(method, "text", stop) for method in ("lora", "adalora", "galore") for stop in (5, STEPS)]


@pytest.mark.parametrize(("method", "kind", "stop"), [*RUNS, ("dora", "rows", 5), ("lora", "rows", 9)])
def test_a_run_killed_and_resumed_is_the_run_that_was_not(llama, tmp_path, dies_at, method, kind, stop):
    whole, killed, resumed = (copy.deepcopy(llama) for _ in range(3))
    history = run(whole, method, Keeping(patience=50), kind)
    facts = {"method": method, "pair": (1, 2)}
    with dies_at(stop):
        run(killed, method, Keeping(patience=50, folder=tmp_path / "a", every=2, facts=facts), kind)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [f"saved-{stop // 2:06d}"]
    torch.rand(7)
    again = run(resumed, method, Keeping(patience=50, folder=tmp_path / "a", resume=True, facts=facts), kind)
    check_same(resumed, whole)
    assert (again.train, again.validation, again.best) == (history.train, history.validation, history.best)


def test_what_is_kept_and_written_changes_nothing(llama, tmp_path):
    twin = copy.deepcopy(llama)
    one = run(llama, "lora")
    two = run(twin, "lora", Keeping(best=False, folder=tmp_path / "a", every=1))
    check_same(llama, twin)
    assert (one.train, one.validation, one.best, two.best) == (two.train, two.validation, None, None)


def test_without_a_checkpoint_it_begins_at_the_beginning(llama, tmp_path):
    twin = copy.deepcopy(llama)
    run(llama, "lora", Keeping())
    run(twin, "lora", Keeping(folder=tmp_path / "none", resume=True))
    check_same(llama, twin)


def test_another_run_is_not_continued(llama, tmp_path, dies_at):
    twin = copy.deepcopy(llama)
    with dies_at(4):
        run(llama, "lora", Keeping(folder=tmp_path, every=2, facts={"lr": 1e-2}))
    with pytest.raises(ValueError, match=r"saved-000002 is of another run \(lr: 0\.01 saved, 0\.1 here\)"):
        run(twin, "lora", Keeping(folder=tmp_path, resume=True, facts={"lr": 1e-1}))


KILL = """
import os, signal, sys, torch
from subspan.cli import finetune, main
from subspan.hosts.keep import Keeper
after = Keeper.after
def die(self, step, history):
    after(self, step, history)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Keeper.after = die
torch.set_num_threads(1)
main(sys.argv[1:])
"""


@pytest.fixture
def command(folder, tmp_path):
    """A run of 8 steps with checkpoints; the place to write to is to be added."""
    page = tmp_path / "page.txt"
    page.write_text("One fine day the cat sat on the mat. " * 60)
    args = ["finetune", folder, "--method", "lora", "--rank", 2, "--data", page, "--steps", 8, "--window", 16,
            "--validate-every", 3, "--checkpoint-every", 2, "-o"]  # fmt: skip
    return [str(arg) for arg in args]


@pytest.mark.full
def test_a_command_that_is_killed_goes_on_with_resume(command, tmp_path, capsys):
    args = [*command, str(tmp_path / "a")]
    done = subprocess.run([sys.executable, "-c", KILL, *args], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a.partial" / "saved-000002").is_dir() and not (tmp_path / "a").exists()
    check_goes_on(command, tmp_path, capsys)


def test_a_command_that_is_interrupted_goes_on_with_resume(command, tmp_path, capsys, monkeypatch):
    after = Keeper.after

    def stop(self, step, history):
        after(self, step, history)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "after", stop)
        told = "the same command with --resume goes on from it"
        check_command(130, told, [*command, str(tmp_path / "a")], capsys)
    check_goes_on(command, tmp_path, capsys)


def check_goes_on(command, tmp_path, capsys):
    args = [*command, str(tmp_path / "a")]
    check_command(1, "pass --resume to go on, or --force to begin anew", args, capsys)
    check_command(1, "rank: 2 saved, 3 here", [*args, "--rank", "3", "--resume"], capsys)
    check_command(0, "going on from", [*args, "--resume"], capsys)
    assert not (tmp_path / "a.partial").exists()
    check_command(0, "training on", [*command, str(tmp_path / "b")], capsys)
    one, two = (io.read_tensors(tmp_path / name / io.WEIGHTS) for name in "ab")
    assert one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())


def check_command(code, told, args, capsys):
    with pytest.raises(SystemExit) as left:
        main(args)
    err = capsys.readouterr().err
    assert (left.value.code or 0) == code, err
    assert told in err


# ---- the best, and an early end


def keeper(keeping=Keeping(), **options):
    w = torch.zeros(3, requires_grad=True)
    return w, Keeper({"w": w}, Optim([("w", w)], Sgd(), lr=0.1, where="w"), keeping, **options)


def judged(losses, keeping, **options):
    """The steps judged before it stopped, and w at the end, which was the step's number at each."""
    w, made = keeper(keeping, **options)
    seen = []
    for step, loss in enumerate(losses):
        w.data.fill_(step)
        seen.append(step)
        if made.judge(step, loss, last=step == len(losses) - 1):
            break
    history = History(validation=[(s, losses[s]) for s in seen])
    made.close(history)
    return seen[-1], w[0].item(), history


@pytest.mark.parametrize(
    ("losses", "patience", "last", "best"),
    [
        ([9, 5, 4, 6, 3, 8, 7], None, 6, 4),
        ([9, 5, 4, 6, 3, 8, 7], 2, 6, 4),
        ([9, 5, 4, 6, 3, 8, 7], 1, 3, 2),
        ([1, 5, 5, 5, 5], 2, 3, 1),
        ([1, 5, 4, 3, 2], 1, 4, 4),
        ([1, 7], 1, 1, 1),
    ],
)
def test_the_best_after_the_first_step_is_kept_and_patience_ends_the_run(losses, patience, last, best):
    stopped, w, history = judged(losses, Keeping(patience=patience))
    assert (stopped, w, history.best) == (last, best, (best, losses[best]))
    assert history.final == losses[best]
    stopped, w, history = judged(losses, Keeping(best=False, patience=patience))
    assert (stopped, w, history.best, history.final) == (last, last, None, losses[last])


def test_states_before_the_ranks_are_final_are_no_candidates():
    assert judged([9, 1, 2, 5, 4, 6], Keeping(patience=1), since=3)[:2] == (5, 4)


def test_the_model_that_is_left_has_the_best_validation_loss(llama):
    history = run(llama, "adamw", Keeping(), every=1)
    losses = dict(history.validation[1:])
    assert history.best == min(losses.items(), key=lambda row: row[1])
    assert nll(llama, data().validation).mean().item() == history.final == history.best[1]
    assert lessons.summary(history, begun(llama, "adamw"))["kept_step"] == history.best[0]


def test_an_early_end_is_the_beginning_of_the_whole_run(llama):
    twin = copy.deepcopy(llama)
    whole = run(llama, "adamw", Keeping(best=False), every=1, lr=1.0)
    short = run(twin, "adamw", Keeping(patience=1), every=1, lr=1.0)
    made = len(short.train)
    assert made < STEPS and short.train == whole.train[:made]
    assert short.validation == whole.validation[: made + 1]
    assert short.validation[-1][1] >= short.validation[-2][1]


def test_patience_and_the_best_are_remembered_over_a_kill(llama, tmp_path, dies_at):
    whole, killed, resumed = (copy.deepcopy(llama) for _ in range(3))
    history = run(whole, "adamw", Keeping(patience=3), every=1, lr=1.0)
    last = len(history.train)
    assert history.best[0] < last < STEPS
    with dies_at(last - 1):
        run(killed, "adamw", Keeping(patience=3, folder=tmp_path, every=1), every=1, lr=1.0)
    again = run(resumed, "adamw", Keeping(patience=3, folder=tmp_path, resume=True), every=1, lr=1.0)
    check_same(resumed, whole)
    assert (again.train, again.validation, again.best) == (history.train, history.validation, history.best)


def test_adalora_ends_early_only_with_its_final_ranks(llama):
    learns = begun(llama, "adalora")
    history = fit(llama, learns, data(), steps=STEPS, every=1, keeping=Keeping(patience=1), lr=1e-2, **ALIKE)
    assert history.best[0] >= learns.ranks.settled
    assert sum(lessons.summary(history, learns)["ranks"].values()) == 3 * len(learns.named) // 3


def test_checkpoints_hold_what_is_fixed_and_the_ranks_too(llama):
    learns = begun(llama, "adalora")
    optimizer = Optim(learns.named, learns.rule, lr=1e-2)
    schedule = lessons.RankSchedule(llama, learns.ranks).attach(optimizer)
    made = keeper_for(llama, learns, optimizer, schedule, Keeping())
    assert made.since == learns.ranks.settled
    assert made.parts().keys() == {*dict(learns.named), *lessons.added(llama)} | {
        f"ranks/{key}" for key in schedule.state_dict()
    }


# ---- folders and settings


def test_a_folder_is_made_free_or_refused(tmp_path, llama, dies_at):
    folder = tmp_path / "a.partial"
    vacate(folder, resume=False, force=False)
    with dies_at(2):
        run(llama, "lora", Keeping(folder=folder, every=1))
    assert ours(folder)
    with pytest.raises(FileExistsError, match="pass --resume to go on, or --force to begin anew"):
        vacate(folder, resume=False, force=False)
    vacate(folder, resume=True, force=False)
    assert checkpoint.newest(folder) is not None
    vacate(folder, resume=False, force=True)
    assert not folder.exists()
    (folder / ".saved-000001.partial-7").mkdir(parents=True)
    vacate(folder, resume=False, force=False)
    assert not folder.exists()
    (folder / "mine").mkdir(parents=True)
    for resume in (True, False):
        with pytest.raises(FileExistsError, match="in the way and no checkpoint"):
            vacate(folder, resume=resume, force=True)
    clear(folder)
    assert (folder / "mine").is_dir()
    (folder / "mine").rmdir()
    clear(folder)
    assert not folder.exists()


def test_rows_curves_and_an_early_end_by_the_command_line(folder, tmp_path, capsys):
    rows = [{"prompt": f"Number {i} is", "completion": f" {i}." + "!" * (60 if i == 3 else 0)} for i in range(30)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ["finetune", folder, "--method", "dora", "--rank", 2, "--data", tmp_path / "x.jsonl", "--window", 32,
            "--steps", 9, "--lr", 30, "--validate-every", 1, "--patience", 1, "-o", tmp_path / "a",
            "--report", tmp_path / "page.html"]  # fmt: skip
    check_command(0, "1 samples are longer than 32 tokens: they were cut;", [str(arg) for arg in args], capsys)
    told = json.loads((tmp_path / "a" / "train.json").read_text())
    steps = [step for step, _ in told["validation"]]
    assert steps[-1] < 9, told["validation"]
    assert told["best"] == min(told["validation"][1:], key=lambda row: row[1])
    shown_page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert shown_page.count("<svg") == 1 and f"Kept is the state after step {told['best'][0]}" in shown_page


def test_a_report_tells_losses_and_digests_tell_data_apart():
    history = History(train=[(1, 3.0), (2, 2.0)], validation=[(0, 3.5), (2, 2.5)])
    made = finetune.page(history, "lora", 0)
    assert [block.kind for block in made.blocks] == ["figure", "table"]
    assert finetune.digest(data()) == finetune.digest(data()) != finetune.digest(data("rows"))
    s = Sample(torch.arange(4), torch.arange(4))
    other = Sample(torch.arange(4), torch.tensor([-100, 1, 2, 3]))
    assert finetune.digest(Rows([s], [s])) != finetune.digest(Rows([other], [s]))


def test_settings_that_will_not_do():
    with pytest.raises(ValueError, match="patience 0 and every None must be at least 1"):
        Keeping(patience=0)
    with pytest.raises(ValueError, match="checkpoints need a folder"):
        Keeping(every=3)
    assert plain({"a": (1, 2)}) == {"a": [1, 2]}


def test_batches_are_those_of_the_seed_for_text_and_rows():
    for kind in ("text", "rows"):
        one, two = (list(batches_of(data(kind), batch=2, steps=3, seed=5)) for _ in range(2))
        pick = (lambda b: b) if kind == "text" else (lambda b: b.ids)
        assert all(torch.equal(pick(a), pick(b)) for a, b in zip(one, two, strict=True)) and len(one) == 3
    assert shown(False).disable and not shown(True).disable
