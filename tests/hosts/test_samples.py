"""Rows of jsonl become samples whose loss counts what is to be learnt, padded or not."""

import copy
import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from subspan.hosts import samples, text
from subspan.hosts.lessons import Learning, fit, forward_sample, glance
from subspan.hosts.samples import Sample, inputs, mean_nll, pad
from subspan.hosts.training import measured, next_token
from subspan.optim import Adam

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last %}(think){% endif %}"
    "{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is an assert?"},
    {"role": "assistant", "content": "A check."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "To find faults."},
]
QUESTION = {"prompt": "What is an assert?", "completion": " A check."}


@pytest.fixture(scope="module")
def ending(words):
    """The tokenizer with an end-of-text token, which is its token 7."""
    made = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer)
    made.eos_token = made.convert_ids_to_tokens(7)
    return made


@pytest.fixture(scope="module")
def chatty(words):
    made = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer)
    made.chat_template = TEMPLATE
    return made


def learnt(found: Sample, tokenizer) -> str:
    assert torch.equal(found.ids[found.labels != -100], found.labels[found.labels != -100])
    return tokenizer.decode(found.ids[found.labels != -100])


def write(folder, *lines: object, name: str = "x.jsonl"):
    file = folder / name
    file.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return file


def some(count: int, longest: int = 14, seed: int = 0) -> list[Sample]:
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(4, longest, (), generator=g))
        ids = torch.randint(300, (length,), generator=g)
        labels = ids.clone()
        labels[: length // 2] = -100
        found.append(Sample(ids, labels))
    return found


# ---- rows


def test_a_text_is_learnt_whole_and_ends_with_the_end_token(words, ending):
    ids = text.encode(words, "One fine day.")
    assert torch.equal(samples.sample({"text": "One fine day."}, words).ids, ids)
    found = samples.sample({"text": "One fine day.", "id": 3}, ending)
    assert torch.equal(found.ids, torch.cat([ids, torch.tensor([7])]))
    assert torch.equal(found.labels, found.ids) and found.learns == len(ids)


def test_only_the_completion_is_learnt_and_the_prompt_has_its_own_tokens(ending):
    found = samples.sample(QUESTION, ending)
    prompt, answer = (text.encode(ending, QUESTION[key]) for key in ("prompt", "completion"))
    assert torch.equal(found.ids, torch.cat([prompt, answer, torch.tensor([7])]))
    assert torch.equal(found.labels, torch.cat([torch.full_like(prompt, -100), answer, torch.tensor([7])]))
    assert found.learns == len(answer) + 1


def test_a_start_token_is_put_where_the_tokenizer_puts_one():
    class Starting:
        bos_token_id = 5

        def __call__(self, _, **__):
            return {"input_ids": [5, 6]}

    assert samples.start(Starting()).tolist() == [5] and samples.end(Starting()).tolist() == []


def test_a_conversation_is_what_the_template_writes_and_the_answers_are_learnt(chatty):
    found = samples.sample({"messages": CHAT}, chatty)
    whole = chatty.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert found.ids.tolist() == list(whole)
    assert learnt(found, chatty) == "A check.<end>To find faults.<end>"


def test_an_answer_that_does_not_end_gets_the_end_token(ending):
    made = copy.deepcopy(ending)
    made.chat_template = TEMPLATE
    found = samples.sample({"messages": CHAT[:3]}, made)
    assert found.ids[-1] == found.labels[-1] == 7
    made.chat_template = TEMPLATE.replace("<end>", made.eos_token)
    assert samples.sample({"messages": CHAT[:3]}, made).ids.tolist().count(7) >= 3
    assert samples.sample({"messages": CHAT[:3]}, made).ids[-2:].tolist().count(7) == 1


def test_without_a_template_turns_are_names_and_words(words, ending):
    found = samples.sample({"messages": CHAT}, words)
    told = "".join(f"{m['role']}: {m['content']}\n\n" for m in CHAT).removesuffix("\n\n")
    assert words.decode(found.ids) == told
    assert learnt(found, words) == " A check. To find faults."
    assert samples.sample({"messages": CHAT}, ending).labels[-1] == 7


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"content": "a"}, r"content, which is no known form; write \{\"text\""),
        ({}, "no keys, which is no known form"),
        ({"text": "a b", "messages": []}, "two forms at once"),
        ({"text": 3}, "text is 3; it must be a string"),
        ({"text": ""}, "nothing to learn"),
        ({"prompt": "What?"}, "completion is null; it must be a string"),
        ({"prompt": "What?", "completion": ""}, "nothing to learn"),
        ({"text": "a\ud800b"}, "surrogate"),
        ({"messages": []}, "at least one"),
        ({"messages": [{"role": "user"}]}, "message 0 must be an object with role and content"),
        ({"messages": [{"role": "bot", "content": "hi"}]}, "role 'bot'; use system, user, assistant, tool"),
        ({"messages": CHAT[:2]}, "no message is of the assistant"),
        ({"messages": [{"role": "assistant", "content": None}]}, "message 0: content is null"),
    ],
)
def test_a_row_that_will_not_do_is_refused_with_its_line(words, tmp_path, row, told):
    file = write(tmp_path, QUESTION, row)
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 2.*{told}"):
        samples.read([file], words, 32)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"", "is empty; remove it"),
        (b"  ", "is empty; remove it"),
        (b'{"text": "Gr\xfc\xdfe"}', r"byte 0xfc at offset 12 is not UTF-8"),
        (b'{"text": ', "is not json"),
        (b"[" * 100_000, "is not json"),
        (b'["text"]', "is a list, not an object"),
    ],
)
def test_a_line_that_is_no_row_is_refused(tmp_path, line, told):
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 2:? {told}"):
        list(samples.rows(write(tmp_path, QUESTION, line, QUESTION)))


def test_files_that_will_not_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(samples.rows(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty; give rows"):
        list(samples.rows(tmp_path / "x.jsonl"))
    with pytest.raises(ValueError, match="give one kind"):
        samples.is_jsonl(["a.jsonl", "b.txt"])
    assert samples.is_jsonl(["a.JSONL"]) and not samples.is_jsonl(["@prose"])


def test_lines_end_at_a_line_feed_only(tmp_path):
    row = {"text": "one\u2028two\x85"}
    file = tmp_path / "x.jsonl"
    file.write_bytes(json.dumps(row, ensure_ascii=False).encode() + b"\r\n" + b'{"text": "b"}')
    assert [found for _, found in samples.rows(file)] == [row, {"text": "b"}]


def test_a_template_that_refuses_or_rewrites_says_so(words):
    made = copy.deepcopy(words)
    made.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match=r"line 3: the tokenizer's chat template refuses .*no system"):
        samples.sample({"messages": CHAT}, made, "a.jsonl, line 3")
    with pytest.raises(ValueError, match="line 4 begins with the assistant"):
        samples.sample({"messages": CHAT[2:]}, made, "a.jsonl, line 4")
    made.chat_template = FORGETFUL
    with pytest.raises(ValueError, match="writes message 2 otherwise once more follows"):
        samples.sample({"messages": CHAT}, made)


def test_what_is_too_long_loses_its_end_and_is_counted(words, tmp_path):
    far = {"prompt": "What is an assert?" * 9, "completion": "A check."}
    full = [samples.sample(row, words) for row in (QUESTION, {"text": "Now and then. " * 9}, far)]
    found = samples.read([write(tmp_path, QUESTION, {"text": "Now and then. " * 9}, far)], words, 20)
    assert (found.cut, found.dropped) == (2, 1)
    for made, whole in zip(found.samples, full, strict=False):
        assert torch.equal(made.ids, whole.ids[:20]) and torch.equal(made.labels, whole.labels[:20])
    with pytest.raises(ValueError, match=r"all 1 samples .* 20 tokens; pass a longer --window"):
        samples.read([write(tmp_path, far)], words, 20)


# ---- batches


def test_the_last_tenth_of_the_rows_is_held_out():
    rows = some(30)
    found = samples.split(rows)
    assert found.train == rows[:27] and found.validation == rows[27:]
    assert len(samples.split(rows[:2]).validation) == 1 and len(samples.split(rows * 100).validation) == 256
    with pytest.raises(ValueError, match="give at least 2"):
        samples.split(rows[:1])


def test_each_sample_comes_once_before_any_comes_again():
    rows = [Sample(torch.full((2,), i), torch.full((2,), i)) for i in range(10)]
    order = torch.cat([b.ids[:, 0] for b in samples.draw(rows, batch=4, steps=10, seed=1)]).tolist()
    assert [sorted(order[i : i + 10]) for i in range(0, 40, 10)] == [list(range(10))] * 4
    again, other = (
        torch.cat([b.ids[:, 0] for b in samples.draw(rows, batch=4, steps=10, seed=s)]) for s in (1, 2)
    )
    assert again.tolist() == order != other.tolist()


def nll_alone(model, s: Sample) -> torch.Tensor:
    """The summed loss of one sample in float64; transformers' own loss rounds logits to float32."""
    logits = model(input_ids=s.ids[None]).logits[0, :-1]
    return cross_entropy(logits, s.labels[1:], reduction="sum")


def test_padding_changes_no_logit(llama):
    rows = some(5)
    batch = pad(rows)
    assert batch.numel() == sum(len(s.ids) for s in rows)
    here = batch.to("cpu")
    logits = llama(input_ids=here.ids, attention_mask=here.mask).logits
    for found, s in zip(logits, rows, strict=True):
        assert_close(found[: len(s.ids)], llama(input_ids=s.ids[None]).logits[0], rtol=1e-11, atol=1e-12)


def test_the_loss_of_a_batch_is_the_mean_over_what_is_learnt_and_so_is_its_gradient(llama):
    rows = some(5)
    expected = sum(nll_alone(llama, s) for s in rows) / sum(s.learns for s in rows)
    want = torch.autograd.grad(expected, list(llama.parameters()))
    found = next_token(llama, pad(rows))
    float32 = {"rtol": 2e-6, "atol": 2e-7}
    assert_close(found.double(), expected, **float32)
    for one, two in zip(torch.autograd.grad(found, list(llama.parameters())), want, strict=True):
        assert (one - two).norm() <= 2e-6 * two.norm()


def test_what_fills_up_may_be_any_token(llama):
    batch = pad(some(4))
    other = samples.Padded(torch.where(batch.mask == 1, batch.ids, 11), batch.labels, batch.mask)
    assert_close(next_token(llama, other), next_token(llama, batch), rtol=1e-12, atol=0)


def test_inputs_of_windows_are_ids_and_labels():
    ids = torch.arange(6).reshape(2, 3)
    assert inputs(ids)["labels"] is ids and inputs(ids)["input_ids"] is ids and len(inputs(ids)) == 2


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_validation_weighs_every_learnt_token_alike(llama, batch):
    rows = some(11)
    total, counted = sum(nll_alone(llama, s).item() for s in rows), sum(s.learns for s in rows)
    expected = total / counted
    llama.train()
    assert mean_nll(llama, rows, batch=batch) == pytest.approx(expected, rel=1e-12)
    assert llama.training and measured(llama, rows) == pytest.approx(expected, rel=1e-12)
    assert sum(samples.sums(llama, [pad(rows)])) == pytest.approx(total, rel=1e-12)


def test_validation_refuses_unknown_ids_and_infinite_losses(llama):
    strange = Sample(torch.tensor([1, 300]), torch.tensor([1, 300]))
    with pytest.raises(ValueError, match="run up to 300, but the model knows 0 to 299"):
        mean_nll(llama, [strange])
    llama.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="validation loss is nan"):
        mean_nll(llama, some(2))


def test_training_on_samples_is_the_loop_written_by_hand(llama):
    twin, rows = copy.deepcopy(llama).train(), samples.split(some(12))
    named = list(llama.named_parameters())
    history = fit(llama, Learning(named, Adam(), {}, "optimizer"), rows, steps=1, batch=3, lr=1e-3, seed=4)
    batch = next(iter(samples.draw(rows.train, batch=3, steps=1, seed=4)))
    assert history.train == [(1, twin(batch.ids, batch.mask, labels=batch.labels).loss.item())]
    assert history.validation[0] == (0, mean_nll(twin, rows.validation))


def test_a_glance_at_samples_sees_no_filling(llama):
    rows = samples.split(some(12))
    seen = list(glance(rows, 2, seed=1).batches)
    assert len(seen) == 16 and all(bool(batch.mask.all()) for batch in seen)
    out = forward_sample(llama, seen[0])
    assert torch.equal(out.logits, llama(seen[0].ids, use_cache=False).logits)
