from __future__ import annotations

import pytest
import torch

from saekit.errors import InvalidInput
from saekit.steering.directions import Direction
from saekit.steering.generate import _Growing, generate, prompt_ids, stream, stream_rows
from saekit.steering.steer import steer

PROMPTS = ["The king sees a river", "A dog", "Once there was a stone in the garden of"]
CHAT = [{"role": "user", "content": "Who are you?"}]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.mark.parametrize("name", ["model", "llama"])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}]
)
def test_a_row_of_a_batch_is_what_its_prompt_and_seed_give_alone(request, name, sampling) -> None:
    model = request.getfixturevalue(name)
    together = generate(model, PROMPTS, 6, seed=7, **sampling)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = generate(model, [prompt], 6, seed=7 + i, **sampling)
        assert alone.text == together[i].text
        assert torch.equal(alone.ids, together[i].ids)


def test_what_comes_back(model) -> None:
    (made,) = generate(model, [PROMPTS[0]], 5)
    ids = model.to_tokens(PROMPTS[0])[0]
    assert made.prompt_length == len(ids)
    assert torch.equal(made.ids[: len(ids)], ids.cpu())
    assert len(made.ids) == len(ids) + 5
    assert made.text == PROMPTS[0] + made.continuation == str(made)


def test_greedy_is_the_bridges_own(model) -> None:
    wanted = model.generate(PROMPTS[0], max_new_tokens=6, do_sample=False, verbose=False)
    assert generate(model, [PROMPTS[0]], 6, temperature=0)[0].text == wanted
    assert generate(model, [PROMPTS[0]], 6, temperature=0, cached=False)[0].text == wanted


def test_sampling_draws_from_the_models_distribution(model) -> None:
    """First tokens of many seeds against their probabilities: a chi-square over the likeliest ones."""
    n, prompt = 400, PROMPTS[1]
    made = generate(model, [prompt] * n, 1, seed=1000, stop_at_eos=False)
    with torch.no_grad():
        p = model(model.to_tokens(prompt))[0, -1].float().softmax(-1)
    likely = p.topk(5).indices
    counts = torch.stack([sum((m.ids[-1] == i).float() for m in made) for i in likely])
    expected = n * p[likely].cpu()
    rest = n - expected.sum()
    chi = ((counts - expected) ** 2 / expected).sum() + (n - counts.sum() - rest) ** 2 / rest
    assert float(chi) < 20.5  # five degrees of freedom, p = 0.001


def test_the_same_seed_draws_the_same_and_leaves_the_global_generator_alone(model) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    texts = [generate(model, [PROMPTS[0]], 8, seed=s)[0].text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_top_k_of_one_is_greedy(model) -> None:
    greedy = generate(model, [PROMPTS[0]], 6, temperature=0)[0].text
    assert generate(model, [PROMPTS[0]], 6, top_k=1, seed=9)[0].text == greedy
    assert generate(model, [PROMPTS[0]], 6, top_p=1e-9, seed=9)[0].text == greedy


def test_pieces_of_a_stream_are_the_text(model) -> None:
    pieces = list(stream(model, PROMPTS[0], 8, seed=4))
    assert len(pieces) > 1
    assert "".join(pieces) == generate(model, [PROMPTS[0]], 8, seed=4)[0].continuation


def test_a_stream_that_is_left_stops_and_one_that_fails_says_so(model, monkeypatch) -> None:
    pieces = stream(model, PROMPTS[0], 100)
    next(pieces)
    pieces.close()
    assert list(pieces) == []
    pieces = stream(model, PROMPTS[0], 4)  # checked at the call, generated when read
    monkeypatch.setattr(model.original_model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(pieces)


def test_edits_that_are_on_are_on_in_a_stream_too(model) -> None:
    push = Direction.random(torch.ones(256) * 50, "blocks.2.hook_resid_pre").add(1.0)
    with steer(model, push):
        steered = "".join(stream(model, PROMPTS[0], 6, seed=4))
        assert steered == generate(model, [PROMPTS[0]], 6, seed=4)[0].continuation
    assert steered != generate(model, [PROMPTS[0]], 6, seed=4)[0].continuation


def test_chats_go_through_the_template(model, monkeypatch) -> None:
    with pytest.raises(InvalidInput, match="no chat template; give a text"):
        generate(model, [CHAT], 3)
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    (made,) = generate(model, [CHAT], 3)
    told = "user: Who are you?\nassistant:"
    assert (
        made.ids[: made.prompt_length].tolist()
        == model.tokenizer(told, add_special_tokens=False)["input_ids"]
    )
    with pytest.raises(InvalidInput, match="role and content"):
        generate(model, [[{"role": "user"}]], 3)


@pytest.mark.parametrize(
    ("prompt", "n", "options", "message"),
    [
        ("", 3, {}, "expected a text, got ''"),
        ("a", 0, {}, "max_new_tokens: expected a whole number from 1, got 0"),
        ("a", True, {}, "max_new_tokens"),
        ("a", 10_000, {}, "do not fit the context"),
        ("a", 3, {"temperature": -1}, "temperature: expected a number from 0"),
        ("a", 3, {"temperature": float("nan")}, "temperature"),
        ("a", 3, {"top_p": 0.0}, r"top_p: expected a share in \(0, 1\], got 0.0"),
        ("a", 3, {"top_k": 0}, "top_k: expected a whole number from 1, got 0"),
        ("a", 3, {"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_wrong_calls(model, prompt, n, options, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        generate(model, [prompt], n, **options)


def test_a_text_that_ends_stops_there(model, monkeypatch) -> None:
    wanted = generate(model, PROMPTS[:2], 6, temperature=0)
    end = int(wanted[0].ids[wanted[0].prompt_length + 2])
    monkeypatch.setattr(type(model.tokenizer), "eos_token_id", end, raising=False)
    first = generate(model, PROMPTS[:2], 6, temperature=0)[0]
    assert first.ids.tolist() == wanted[0].ids[: wanted[0].prompt_length + 3].tolist()
    assert len(prompt_ids(model, PROMPTS[0], 6)) == wanted[0].prompt_length


@pytest.mark.parametrize("name", ["model", "llama"])
def test_rows_of_a_stream_grow_into_what_generate_gives(request, name) -> None:
    model = request.getfixturevalue(name)
    told, steps, rows = ["", "", ""], 0, stream_rows(model, PROMPTS, 6, seed=[4, 5, 4])
    while True:
        try:
            pieces = next(rows)
        except StopIteration as end:
            made = end.value
            break
        steps += 1
        told = [text + piece for text, piece in zip(told, pieces, strict=True)]
    expected = generate(model, PROMPTS, 6, seed=[4, 5, 4])
    assert told == [one.continuation for one in made] == [one.continuation for one in expected]
    assert steps == 6
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(made, expected, strict=True))


def test_a_character_of_several_tokens_comes_whole(model) -> None:
    """Bytes of an emoji one by one: nothing is told until the last."""
    ids = model.tokenizer("😀", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    prompt = prompt_ids(model, "A", 8)
    growing = _Growing(model, prompt)
    pieces = [
        growing.grown(torch.cat([prompt, torch.tensor(ids[: n + 1])]), last=False) for n in range(len(ids))
    ]
    assert pieces == [""] * (len(ids) - 1) + ["😀"]
    half = torch.cat([prompt, torch.tensor(ids[:1])])
    assert _Growing(model, prompt).grown(half, last=True) == "\ufffd"


def test_without_an_end_a_text_goes_on(model, monkeypatch) -> None:
    """`stop_at_eos=False` also where the model's own settings name an end."""
    (wanted,) = generate(model, PROMPTS[:1], 6, temperature=0)
    end = int(wanted.ids[wanted.prompt_length + 2])
    monkeypatch.setattr(model.original_model.generation_config, "eos_token_id", [end, 0])
    (ended,) = generate(model, PROMPTS[:1], 6, temperature=0)
    assert len(ended.ids) == wanted.prompt_length + 3
    (goes_on,) = generate(model, PROMPTS[:1], 6, temperature=0, stop_at_eos=False)
    assert torch.equal(goes_on.ids, wanted.ids)


def test_a_model_without_a_cache_reads_it_all_again(model, monkeypatch) -> None:
    whole = model.original_model.forward
    lengths = []

    def without(input_ids, **options):
        lengths.append(input_ids.shape[1])
        made = whole(input_ids=input_ids, **options)
        made.past_key_values = None
        return made

    expected = generate(model, PROMPTS[:2], 4, temperature=0)
    monkeypatch.setattr(model.original_model, "forward", without)
    again = generate(model, PROMPTS[:2], 4, temperature=0)
    assert [one.text for one in again] == [one.text for one in expected]
    assert lengths == list(range(lengths[0], lengths[0] + 4))


def test_tensors_may_go_into_autograd_afterwards(model) -> None:
    (made,) = generate(model, PROMPTS[:1], 3)
    weight = torch.randn(8192, 4, requires_grad=True)
    torch.nn.functional.embedding(made.ids, weight).sum().backward()
    assert weight.grad is not None


def test_ids_are_taken_as_they_are(model) -> None:
    ids = model.to_tokens(PROMPTS[0])[0]
    (made,) = generate(model, [ids], 5, seed=2)
    assert torch.equal(made.ids, generate(model, PROMPTS[:1], 5, seed=2)[0].ids)
    (without,) = generate(model, [ids[1:]], 5, seed=2)
    assert without.prompt_length == len(ids) - 1
    for wrong, message in [
        (ids[None], r"expected ids \[T\]"),
        (ids.float(), "int64"),
        (ids[:0], "expected ids"),
        (ids - 9_000, "ids from 0 to 8191 expected"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            generate(model, [wrong], 5)
