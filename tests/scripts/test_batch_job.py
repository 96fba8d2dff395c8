"""A file of prompts becomes a file of texts: in order, each as alone, whenever the job was stopped before."""

import fcntl
import json
import re
import resource
import shutil
import signal
import time

import jax
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import batch_job, batch_output


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.fixture(scope="module")
def done(run, sample, prompts, tmp_path_factory):
    """What the job of `job` writes by default, and the file beside it."""
    path = tmp_path_factory.mktemp("done") / "out.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_job, "ROUNDS", 3)
        sample([str(arg) for arg in (run, "--input", prompts, "--output", path, "--batch-size", 4)])
    return path.read_bytes(), path.with_name("out.jsonl.job").read_bytes()


def test_lines_are_in_order_and_carry_what_was_given(done, prompts):
    rows = lines_of(prompts)
    found = [json.loads(line) for line in done[0].split(b"\n")[:-1]]
    assert [{name: line[name] for name in row} for row, line in zip(rows, found, strict=True)] == rows
    for row, line in zip(rows, found, strict=True):
        assert [*line] == [*row, "text", "n_tokens", "finish", "log_prob"]
        most = row.get("max_new_tokens", 64 - len(row["prompt"]))  # the model has 64 positions
        assert (line["n_tokens"], len(line["text"]), line["finish"]) == (most, most, "length")
        assert -6 * most < line["log_prob"] < 0


def test_each_text_is_that_of_its_prompt_alone(run, job, tmp_path):
    said = job("--temperature", 0)
    assert re.fullmatch(r"20 texts, \d+ tokens in \d+\.\d s, with compilation: [\d,]+ tokens/s\n", said)
    found, tokenizer = tx.load_pretrained(run), tx.load_tokenizer(run)
    model = tx.build(found.cfg)
    for line in lines_of(tmp_path / "out.jsonl")[::3]:
        out = tx.generate(model, found.params, tokenizer.encode(line["prompt"])[None], max_new_tokens=line["n_tokens"])
        assert tokenizer.decode(np.asarray(out.tokens[0])) == line["text"]
        assert float(out.log_probs.sum()) == pytest.approx(line["log_prob"], abs=2e-3)


def test_cut_anywhere_it_goes_on_to_the_same_bytes(job, done, tmp_path):
    path = tmp_path / "out.jsonl"
    whole, beside = done
    for at in [1, *np.random.default_rng(3).integers(2, len(whole) - 1, 6), whole.index(b"\n") + 1, len(whole) - 1]:
        path.write_bytes(whole[:at])
        path.with_name("out.jsonl.job").write_bytes(beside)
        n = whole[:at].count(b"\n")
        assert job().startswith(f"continuing after text {n} of 20\n" if n else "20 texts, ")
        assert path.read_bytes() == whole
    assert job() == f"{path} has all 20 texts; there is nothing to do\n"
    assert path.read_bytes() == whole
    assert job("--batch-size", 7) == f"{path} has all 20 texts; there is nothing to do\n"  # a size of its own changes


def test_it_goes_on_by_the_call_that_it_was_stopped_in(job, done, tmp_path, monkeypatch):
    """Rounding may differ in another batch, so that to write only what is missing would not give the same bytes."""
    path, calls, write_all = tmp_path / "out.jsonl", [], batch_job.write_all

    def counted(model, params, prompts, *, first, **more):
        calls.append((first, len(prompts)))
        return write_all(model, params, prompts, first=first, **more)

    monkeypatch.setattr(batch_job, "write_all", counted)
    path.with_name("out.jsonl.job").write_bytes(done[1])
    for n, expected in {5: [(0, 12), (12, 8)], 12: [(12, 8)], 14: [(12, 8)]}.items():
        path.write_bytes(b"".join(done[0].splitlines(keepends=True)[:n]))
        calls.clear()
        job()
        assert (calls, path.read_bytes()) == (expected, done[0])


def test_killed_it_goes_on_to_the_same_bytes(run, sample, child, tmp_path):
    many = write_rows(tmp_path / "many.jsonl", [{"prompt": "the", "n": i} for i in range(90)])
    flags = [str(arg) for arg in (run, "--input", many, "--batch-size", 1, "--max-new-tokens", 50, "--output")]
    killed, path = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    process = child("sample.py", *flags, killed)
    while process.poll() is None and not (killed.exists() and killed.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=100)
    assert 0 < len(killed.read_bytes().splitlines()) < 90
    for output in (killed, path):
        sample([*flags, str(output)])
    assert killed.read_bytes() == path.read_bytes()
    assert len({line["text"] for line in lines_of(path)}) > 10  # each is drawn by its own key


def test_what_differs_is_refused_and_nothing_is_lost(run, job, done, prompts, tmp_path):
    path, whole, given = tmp_path / "out.jsonl", done[0], prompts.read_bytes()
    half = whole[: len(whole) // 2]
    path.write_bytes(half)
    (tmp_path / "out.jsonl.job").write_bytes(done[1])
    start, another = f"output='{path}' is of a job with ", "; name another --output, or use its values"
    assert job.refuses("--seed", 1) == f"{start}seed=0, not 1{another}"
    assert job.refuses("--stop", "a", "--top-k", 3) == f"{start}stop=[], not ['a'], top_k=None, not 3{another}"
    assert job.refuses("--step", 20) == f"{start}step=40, not 20{another}"
    others = write_rows(tmp_path / "others.jsonl", [row | {"id": -1} for row in lines_of(prompts)])
    assert job.refuses(input=others).startswith(f"{start}prompts='")
    shutil.copytree(run, tmp_path / "copy")
    assert job.refuses(model=tmp_path / "copy").startswith(f"{start}model='")
    assert path.read_bytes() == half
    spoilt = half.replace(b'"id": 2', b'"id": 7')
    path.write_bytes(spoilt)
    mend = "mend it, or name another --output"
    assert job.refuses() == f"line 3 of {path} is not what its job wrote; {mend}"
    path.write_bytes(b"\0\n" + half)
    assert job.refuses() == f"line 1 of {path} is not what its job wrote; {mend}"
    path.write_bytes(whole + whole.splitlines(keepends=True)[-1])
    assert job.refuses() == f"line 21 of {path} is not what its job wrote; {mend}"
    (tmp_path / "out.jsonl.job").write_text("[")
    assert job.refuses().startswith(f"{tmp_path / 'out.jsonl.job'} cannot be read: ")
    (tmp_path / "out.jsonl.job").unlink()
    path.write_bytes(b"mine")
    says = "is there already, without a out.jsonl.job that says of what job; name another --output"
    assert job.refuses() == f"output='{path}' {says}"
    assert path.read_bytes() == b"mine"
    assert job.refuses(output=prompts) == f"output='{prompts}' {says.replace('out.jsonl', 'prompts.jsonl')}"
    assert prompts.read_bytes() == given
    assert job.refuses(output=tmp_path) == f"output='{tmp_path}' is no file; name a file, or a new one"
    none = tmp_path / "none" / "out.jsonl"
    assert job.refuses(output=none).startswith(f"output='{none}' cannot be written (No such file or directory); mend ")


def test_an_output_without_a_line_is_no_other_job(job, tmp_path, done):
    path = tmp_path / "out.jsonl"
    path.touch()
    (tmp_path / "out.jsonl.job").write_text('{"seed": 9}')
    job()
    assert (path.read_bytes(), (tmp_path / "out.jsonl.job").read_bytes()) == done


def test_two_processes_do_not_write_one_output(job, tmp_path):
    path = tmp_path / "out.jsonl"
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        says = f"output='{path}' is being written by another process; wait for its end, or name another"
        assert job.refuses() == says
    assert path.read_bytes() == b""
    job()
    assert len(lines_of(path)) == 20


def test_a_full_disk_is_one_line_and_then_it_goes_on(job, done, tmp_path, monkeypatch):
    """The bound on the size of a file stands for the disk: it cuts a line in its middle."""
    path, soft_hard = tmp_path / "out.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    append = batch_output.append

    def bounded(*given):
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, soft_hard[1]))
        try:
            append(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)

    monkeypatch.setattr(batch_job, "append", bounded)
    rest = "mend that, and run the same command again: it goes on from what is there"
    assert job.refuses() == f"output='{path}' cannot be written (File too large); {rest}"
    assert path.read_bytes() == done[0][:700]
    monkeypatch.setattr(batch_job, "append", append)
    job()
    assert path.read_bytes() == done[0]


def test_stop_strings_and_expressions(job, tmp_path):
    path = tmp_path / "out.jsonl"
    job("--stop", "at", "zzz")
    whole = lines_of(path)
    assert {line["finish"] for line in whole} == {"stop", "length"}
    for line in whole:
        assert "at" not in line["text"]
        assert line["n_tokens"] == len(line["text"]) + 2 * (line["finish"] == "stop")
    path.unlink()
    pytest.importorskip("outlines_core")
    job("--regex", "(cat|mat)[.]{2}", "--max-new-tokens", 20)
    for line in lines_of(path):
        most = line.get("max_new_tokens", 20)
        assert line["text"] in {text[:most] for text in ("cat..", "mat..")}
        assert line["finish"] == ("stop" if most >= 5 else "length")


def test_empty_lines_are_left_out_and_any_character_is_carried(job, tmp_path):
    """Even half of a surrogate pair, though UTF-8 has none."""
    odd = tmp_path / "odd.jsonl"
    odd.write_bytes(b'\xef\xbb\xbf\n{"prompt": "the", "of": "\xc3\xa9"}\r\n  \n{"prompt": "a", "of": "\\ud800"}')
    job("--max-new-tokens", 2, input=odd)
    assert [line["of"] for line in lines_of(tmp_path / "out.jsonl")] == ["é", "\ud800"]
    assert b'"of": "\xc3\xa9"' in (tmp_path / "out.jsonl").read_bytes()


def test_progress_without_a_terminal_is_lines(job, monkeypatch):
    monkeypatch.setattr(batch_job, "QUIET", 0)
    said = job().splitlines()
    assert len(said) == 21
    assert re.fullmatch(r"text    20/20  [\d,]+ tokens/s", said[-2])


def test_prefix_lm_is_refused(run, job, tmp_path):
    shutil.copytree(run, tmp_path / "prefix")
    config = tmp_path / "prefix" / "config.json"
    text = config.read_text().replace('"next_token"', '"prefix_lm"').replace('"window": 16', '"window": null')
    config.write_text(text)
    says = "--input is not for a model of the objective prefix_lm; give it one --prompt at a time"
    assert job.refuses(model=tmp_path / "prefix") == says


def test_chats_are_answered(public, sample, job, tmp_path, capsys):
    rows = [{"prompt": "the cat"}, {"messages": [{"role": "user", "content": "the cat"}]}, {"prompt": "sat on"}]
    chat = write_rows(tmp_path / "chat.jsonl", rows)
    flags = ("--temperature", 0, "--max-new-tokens", 20)
    job(*flags, model=public, input=chat)
    first, same, other = lines_of(tmp_path / "out.jsonl")
    added = {name: first[name] for name in batch_output.ADDED}
    assert added == {name: same[name] for name in added} != {name: other[name] for name in added}
    sample([str(arg) for arg in (public, "--prompt", "the cat", *flags)])
    assert capsys.readouterr().out == first["text"] + "\n"
    job(*flags, "--system", "be brief", model=public, input=chat, output=tmp_path / "system")
    told, same, _ = lines_of(tmp_path / "system")
    assert told["text"] == same["text"] != first["text"]
    write_rows(chat, [{"messages": [{"role": "user"}]}])
    assert "line 1 of " in (says := job.refuses(model=public, input=chat, output=tmp_path / "new"))
    assert "messages[0]={'role': 'user'} must have texts as role and content" in says


def test_an_id_that_ends_a_text_is_no_part_of_it(public, job, tmp_path):
    many = write_rows(tmp_path / "many.jsonl", [{"prompt": "the"}] * 8)
    pytest.importorskip("outlines_core")
    job("--raw", "--regex", "(the|a) (cat|mat)?", "--max-new-tokens", 30, model=public, input=many)
    for line in lines_of(tmp_path / "out.jsonl"):
        assert re.fullmatch("(the|a) (cat|mat)?", line["text"])
        assert line["finish"] == "stop"
        assert line["n_tokens"] >= 2


def test_a_log_probability_that_is_none(run):
    """JSON has no NaN."""
    tokenizer = tx.load_tokenizer(run)
    writer = batch_job.Writer(None, {}, tokenizer, (), None, tx.Sampler(), jax.random.key(0))
    one = batch_job.Written(0, np.array([3, 4]), np.array([np.nan, -1], np.float32))
    assert batch_job.answer(writer, one, None) == {
        "text": tokenizer.decode([3, 4]), "n_tokens": 2, "finish": "length", "log_prob": None,
    }  # fmt: skip
