import itertools
import math
import sys
import weakref

import pytest
import torch
from torch.testing import assert_close

from subspan.hosts import score, text

IDS = torch.arange(5 * 12).reshape(5, 12) * 37 % 300


def by_definition(model, windows):
    with torch.no_grad():
        p = model(input_ids=windows).logits.softmax(-1)
    found = [
        [p[i, t, windows[i, t + 1]].log().item() for t in range(windows.shape[1] - 1)] for i in range(len(windows))
    ]
    return torch.tensor([-sum(row) / len(row) for row in found], dtype=torch.float64)


# ---- scoring


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_nll_is_its_definition_for_any_batch(llama, batch):
    assert_close(score.nll(llama, IDS, batch=batch), by_definition(llama, IDS), rtol=1e-12, atol=0)


def test_nll_is_the_hosts_own_loss(llama):
    for window, found in zip(IDS, score.nll(llama, IDS)):
        assert_close(found, llama(input_ids=window[None], labels=window[None]).loss.double(), rtol=1e-6, atol=0)


def test_perplexity_is_exp_of_the_mean_over_windows(llama):
    assert score.perplexity(llama, IDS, batch=2) == pytest.approx(
        math.exp(by_definition(llama, IDS).mean()), rel=1e-12
    )


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(llama):
    llama.model.norm.weight.data.zero_()
    assert score.perplexity(llama, IDS) == pytest.approx(300, rel=1e-12)


def test_the_first_token_is_not_predicted_and_the_last_is(llama):
    first, last = IDS.clone(), IDS.clone()
    llama.model.norm.weight.data.zero_()
    llama.lm_head.weight = torch.nn.Parameter(llama.lm_head.weight.detach().clone())
    llama.lm_head.bias = torch.nn.Parameter(torch.arange(300.0, dtype=torch.float64) / 100)
    first[:, 0], last[:, -1] = 299, 299
    usual = score.nll(llama, IDS)
    assert_close(score.nll(llama, first), usual, rtol=0, atol=0)
    # Each step up in the bias of the last token is one less in its own nll, shared by 11 predictions.
    assert_close(usual - score.nll(llama, last), (299 - IDS[:, -1]).double() / 100 / 11, rtol=1e-10, atol=1e-12)


def test_bfloat16_logits_are_scored_in_float32(llama):
    llama.bfloat16()
    with torch.no_grad():
        logits = llama(input_ids=IDS[:1]).logits.double()
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:])
    assert_close(score.nll(llama, IDS[:1])[0], expected, rtol=1e-6, atol=0)


def test_one_batch_of_logits_is_alive_at_a_time(llama):
    alive, peaks = weakref.WeakSet(), []

    def watch(module, args, out):
        alive.add(out.logits)
        peaks.append((len(alive), len(out.logits)))

    llama.register_forward_hook(watch)
    score.nll(llama, IDS, batch=2)
    assert peaks == [(1, 2), (1, 2), (1, 1)]


def test_training_modes_and_gradients_are_left_as_they_were(llama):
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()]
    seen = []
    llama.register_forward_hook(
        lambda module, args, out: seen.append((module.training, torch.is_inference_mode_enabled()))
    )
    result = score.nll(llama, IDS)
    assert set(seen) == {(False, True)} and not result.is_inference()
    assert [module.training for module in llama.modules()] == before
    with pytest.raises(RuntimeError, match="stop"):
        llama.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(RuntimeError("stop")))
        score.nll(llama, IDS)
    assert [module.training for module in llama.modules()] == before


def test_progress_is_shown_only_when_asked_for(llama, capfd):
    score.nll(llama, IDS)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("windows", "match"),
    [
        (IDS[0], r"shape \(12,\); it must be \(count >= 1, length >= 2\)"),
        (IDS[:, :1], r"shape \(5, 1\)"),
        (IDS[:0], r"shape \(0, 12\)"),
        (IDS.float(), "dtype torch.float32; it must hold token ids"),
        (torch.tensor([[4, 300, 5]]), r"run from 4 to 300, but the model knows 0 to 299; .* own tokenizer"),
        (IDS - 1, "run from -1 to"),
    ],
)
def test_windows_that_the_model_cannot_take(llama, windows, match):
    with pytest.raises(ValueError, match=match):
        score.nll(llama, windows)


def test_a_batch_below_one(llama):
    with pytest.raises(ValueError, match="batch is 0; it must be at least 1"):
        score.perplexity(llama, IDS, batch=0)


def test_logits_that_are_not_finite_are_an_error(llama):
    llama.model.embed_tokens.weight.data[IDS[3, 4]] = float("nan")
    with pytest.raises(ValueError, match=r"window 0: its negative log-likelihood is nan"):
        score.perplexity(llama, IDS)


# ---- decoding


@pytest.mark.parametrize("shape", [(6,), (1, 6)])
def test_decoding_with_the_cache_is_greedy_decoding_without_it(llama, shape):
    ids = IDS[0, :6]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, llama(input_ids=ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
    found, seconds = score.decode(llama, IDS[0, :6].reshape(shape), new_tokens=8)
    assert found.tolist() == ids[6:].tolist() and seconds > 0


def test_speed_is_timed_tokens_over_the_median_time(llama, monkeypatch):
    ticks = itertools.chain.from_iterable((0.0, took) for took in (4.0, 100.0, 2.0))
    monkeypatch.setattr(score, "perf_counter", lambda: next(ticks))
    calls = []
    llama.register_forward_pre_hook(lambda *args: calls.append(1))
    assert score.decode_speed(llama, IDS[0, :6], new_tokens=8, repeats=3) == 8 / 4.0
    assert len(calls) == 3 * (1 + 8)


def test_bad_decoding_arguments(llama):
    with pytest.raises(ValueError, match=r"prompt_ids has shape \(5, 12\)"):
        score.decode_speed(llama, IDS)
    with pytest.raises(ValueError, match="repeats is 0 and new_tokens 16; both must be at least 1"):
        score.decode_speed(llama, IDS[0], repeats=0)
    with pytest.raises(ValueError, match="new_tokens is 1; it must be at least 2"):
        score.decode(llama, IDS[0], new_tokens=1)
    with pytest.raises(ValueError, match="the token ids run from 300 to 300"):
        score.decode(llama, torch.tensor([300]), new_tokens=2)


# ---- text


def test_windows_are_the_text_cut_in_order():
    ids = torch.arange(103)
    assert text.windows(ids, 10, start=3).flatten().tolist() == list(range(3, 103))
    assert text.windows(ids, 10).flatten().tolist() == list(range(100))
    assert text.windows(ids, 10, 2, 5).tolist() == [list(range(5, 15)), list(range(15, 25))]


def test_windows_of_a_text_that_is_too_short():
    match = r"7 tokens, 7 of them from token 0 on; 1 window\(s\) of length 8 need 8; give a longer text"
    with pytest.raises(ValueError, match=match):
        text.windows(torch.arange(7), 8)
    with pytest.raises(ValueError, match=r"has 7 tokens, 5 of them from token 2 on; 3 .* of length 2 need 6"):
        text.windows(torch.arange(7), 2, count=3, start=2)
    with pytest.raises(ValueError, match="has 7 tokens, 0 of them from token 9 on"):
        text.windows(torch.arange(7), 2, start=9)
    for bad in [{"length": 0}, {"length": 2, "count": 0}, {"length": 2, "start": -1}]:
        with pytest.raises(ValueError, match="length and count must be at least 1, start at least 0"):
            text.windows(torch.arange(7), **bad)
    with pytest.raises(ValueError, match=r"shape \(1, 7\)"):
        text.windows(torch.arange(7)[None], 2)


def test_the_code_corpus_is_a_prefix_in_path_order():
    head = text.code(200_000)
    assert len(head) == 200_000 and text.code(5_000) == head[:5_000]
    names = [path.as_posix() for path in itertools.islice(text._sources(), 40)]
    assert names == sorted(names) and not [name for name in names if "/test/" in name or "site-packages" in name]
    with pytest.raises(ValueError, match="limit_chars is 0"):
        text.code(0)


def test_read_joins_files_and_corpora(tmp_path):
    (tmp_path / "a.txt").write_bytes("Grüße\r\n".encode())
    assert text.read([tmp_path / "a.txt", str(tmp_path / "a.txt")]) == "Grüße\r\n\n\nGrüße\r\n"
    assert text.read(["@prose"]) == text.prose()


def test_read_names_what_is_wrong(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    with pytest.raises(ValueError, match=r"bad.txt: byte 0xff at offset 5 is not UTF-8 .*convert the file"):
        text.read([tmp_path / "bad.txt"])
    with pytest.raises(ValueError, match=r"empty.txt is empty \(2 bytes\)"):
        text.read([tmp_path / "empty.txt"])
    with pytest.raises(FileNotFoundError, match=r"absent.txt: no such text file; .* @prose or @code"):
        text.read([tmp_path / "absent.txt"])
    with pytest.raises(ValueError, match="is a folder"):
        text.read([tmp_path])
    with pytest.raises(ValueError, match="no text was named"):
        text.read([])
    with pytest.raises(TypeError, match=r"is the one path 'a.txt'; give a list"):
        text.read("a.txt")


@pytest.mark.parametrize("sample", ["def f(x):\n\treturn 'é'\n", "\x00 \ufffd 漢字 🙂", "  two  spaces  "])
def test_a_trained_tokenizer_loses_nothing(words, sample, capfd):
    tokenizer = text.train_tokenizer(text.prose()[:20_000], 300)
    ids = text.encode(tokenizer, sample)
    assert tokenizer.decode(ids.tolist()) == sample and tokenizer.get_vocab_size() == 300
    assert text.encode(words, sample).tolist() == ids.tolist()
    assert capfd.readouterr() == ("", "")


def test_bad_training_of_a_tokenizer():
    with pytest.raises(ValueError, match="vocab is 255; byte-level BPE needs at least 256"):
        text.train_tokenizer("abc", 255)
    with pytest.raises(ValueError, match="the text is empty"):
        text.train_tokenizer("", 300)


# ---- smollm2


@pytest.mark.smollm2
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the help text differs between versions of Python")
def test_smollm2_on_the_language_help(smollm2):
    ids = text.encode(smollm2.tokenizer, text.prose())
    assert score.perplexity(smollm2.model, text.windows(ids, 512, 16)) == pytest.approx(14.94, abs=0.005)
