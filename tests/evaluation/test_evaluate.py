"""The comparison table against an oracle: one unpadded sequence at a time, materialised logits."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from toy import make_model, make_tokenizer
from toy_evaluation import P, make_prompt, make_records, run
from toy_run import CONTEXT, HELD_OUT, NEW_TOKENS

from softprompt_fast.data.queries import student_layout, teacher_ids, tokenize_query
from softprompt_fast.evaluation.baselines import CONDITIONS
from softprompt_fast.evaluation.report.tables import side_by_side, table


def oracle_inputs(model, prompt, query, kept):
    """What the model reads in each condition, as embeddings [L, D]. kept: the pruned context."""
    embed = model.get_input_embeddings()

    def of(ids):
        return embed(torch.tensor(ids, dtype=torch.long))

    before, after = student_layout(query, prompt.config.placement)
    return {
        "full context": of(teacher_ids(query)),
        "no context": of(query.plain),
        "cut context": of(query.before + query.context[:P] + query.after),
        "pruned context": of(query.before + kept + query.after),
        "retrieved chunk": of(teacher_ids(query)),  # it is all of this context
        "soft prompt": torch.cat([of(before), prompt.embedding, of(after)]),
    }


def pruned(model, query):
    """The context's P tokens of the largest surprise, one prediction at a time."""
    surprise = []
    for place, token in enumerate(query.context):
        read = torch.tensor([query.before + query.context[:place]])
        log_q = model(input_ids=read, use_cache=False).logits[0, -1].double().log_softmax(-1)
        surprise.append(-log_q[token].item())
    kept = sorted(range(len(surprise)), key=surprise.__getitem__)[-P:]
    return [query.context[place] for place in sorted(kept)]


def greedy(model, inputs):
    end, ids = make_tokenizer().eos_token_id, []
    while len(ids) < NEW_TOKENS and (not ids or ids[-1] != end):
        more = model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
        logits = model(inputs_embeds=torch.cat([inputs, more])[None], use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids


def log_probs(model, inputs, ids):
    """[n, V] fp64, at the positions that predict ``ids``."""
    more = model.get_input_embeddings()(torch.tensor(ids[:-1], dtype=torch.long))
    logits = model(inputs_embeds=torch.cat([inputs, more])[None], use_cache=False).logits
    return logits[0, -len(ids) :].double().log_softmax(-1)


def transposed(rows):
    """The first entries of all rows, then the second ones, and so on."""
    return [[row[i] for row in rows if i < len(row)] for i in range(max(map(len, rows)))]


@pytest.mark.parametrize("placement", ["system", "prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "falcon_h1", "minimax"])
@torch.no_grad()
def test_rows_and_answers_are_the_oracles(architecture, placement):
    model = make_model(architecture)
    prompt = make_prompt(model, placement=placement)
    report = run(model, prompt)
    kept = None
    kl, agree, nll, delta, entropy = ({name: [] for name in CONDITIONS} for _ in range(5))
    for record, shown in zip(make_records(), report["answers"], strict=True):
        query = tokenize_query(make_tokenizer(), record.messages, CONTEXT)
        kept = kept or pruned(model, query)  # all queries have one context
        inputs = oracle_inputs(model, prompt, query, kept)
        ids = greedy(model, inputs["full context"])
        log_p = log_probs(model, inputs["full context"], ids)
        for name in CONDITIONS:
            log_q = log_probs(model, inputs[name], ids)
            kl[name].append((log_p.exp() * (log_p - log_q)).sum(-1))
            agree[name].append((log_p.argmax(-1) == log_q.argmax(-1)).double())
            nll[name].append(-log_q[range(len(ids)), ids])
            delta[name].append((log_q.exp() - log_p.exp())[range(len(ids)), ids])
            entropy[name].append(-(log_q.exp() * log_q).sum(-1))
            for token, x in zip(shown["tokens"], kl[name][-1].tolist(), strict=True):
                assert token["kl"][name] == pytest.approx(x, rel=1e-3, abs=1e-6)
            text = make_tokenizer().decode(greedy(model, inputs[name]), skip_special_tokens=True)
            assert shown[name] == text.strip()
    without = torch.cat(kl["no context"]).mean()
    for name in CONDITIONS:
        row = report["conditions"][name]
        mean = torch.cat(kl[name]).mean().item()
        assert row["kl"] == pytest.approx(mean, rel=1e-4, abs=1e-6)
        assert row["top1_agreement"] == pytest.approx(torch.cat(agree[name]).mean().item())
        assert row["perplexity"] == pytest.approx(
            torch.cat(nll[name]).mean().exp().item(), rel=1e-4
        )
        assert row["kl_recovered"] == pytest.approx(1 - mean / without.item(), abs=1e-4)
        rms = torch.cat(delta[name]).square().mean().sqrt().item()
        assert row["rms_delta_p"] == pytest.approx(rms, rel=1e-4, abs=1e-6)
        assert row["entropy"] == pytest.approx(torch.cat(entropy[name]).mean().item(), rel=1e-4)
        means = [torch.stack(at).mean().item() for at in transposed(kl[name])]
        assert report["series"][name]["kl_by_position"] == pytest.approx(means, rel=1e-3, abs=1e-6)
    assert report["kl_recovered"] == report["conditions"]["soft prompt"]["kl_recovered"]
    assert report["conditions"]["no context"]["kl"] > 0.01


def test_the_contexts_own_embeddings_recover_everything():
    model = make_model()
    length = len(make_tokenizer()(CONTEXT)["input_ids"])
    report = run(model, make_prompt(model, num_virtual_tokens=length, prompt_tuning_init="context"))
    assert report["conditions"]["soft prompt"]["kl"] <= 1e-6
    assert report["conditions"]["cut context"]["kl"] <= 1e-6
    assert report["conditions"]["pruned context"]["kl"] <= 1e-6
    assert report["kl_recovered"] == pytest.approx(1, abs=1e-5)


def test_answers_of_the_data_are_scored_as_they_are():
    """Then the most probable token need not be the answer's, and the two measures differ."""
    report = run(make_model(), make_prompt(make_model()), make_records(completion="Yes!"))
    end = 1
    assert report["answer_tokens"] == len(HELD_OUT) * (len(b"Yes!") + end)
    assert report["conditions"]["full context"]["perplexity"] > 2
    assert report["conditions"]["full context"]["top1_agreement"] == 1


@torch.no_grad()
def test_the_answer_shown_for_the_full_context_is_the_models_own():
    model = make_model()
    given = run(model, make_prompt(model), make_records(completion="Yes!"))
    written = run(model, make_prompt(model))
    for one, other in zip(given["answers"], written["answers"], strict=True):
        assert [one[name] for name in CONDITIONS] == [other[name] for name in CONDITIONS]


def test_the_report_is_json_and_its_tables_are_plain_text():
    report = json.loads(json.dumps(run(make_model(), make_prompt(make_model()), num_samples=1)))
    assert (report["queries"], report["num_virtual_tokens"], len(report["answers"])) == (3, P, 1)
    report["answers"][0]["soft prompt"] = "a[red]b\x1b[2J\x07c"
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(report))
    console.print(side_by_side(report))
    text = console.export_text()
    assert "pruned context" in text
    assert "KL recovered" in text
    assert r"a[red]b\x1b[2J\x07c" in text
    assert "\x1b" not in text


def test_no_queries_are_refused():
    with pytest.raises(ValueError, match="evaluation needs at least one query"):
        run(make_model(), make_prompt(make_model()), [])
